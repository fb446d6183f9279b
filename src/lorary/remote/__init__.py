"""Libraries that lie elsewhere: pushed, pulled and cloned as objects named by their sha256."""
