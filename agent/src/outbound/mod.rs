//! From a pod of this node to the mesh.
