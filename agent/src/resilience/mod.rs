//! Retry, budget, breaker, ejection, limits, balancing. Pure: time is passed in.
