//! From the mesh to a pod of this node.
