"""The lossy stand-in of a span: what one is made of, and how it is loaded."""
