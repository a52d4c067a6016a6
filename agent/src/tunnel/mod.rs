//! HBONE: HTTP/2 CONNECT over mutual TLS 1.3.
