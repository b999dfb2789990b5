"""Who may do what on a node, and how much: a policy file, read and enforced."""
