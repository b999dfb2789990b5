"""With bitsandbytes, which slows the start of whatever can import it: `make test` runs these by themselves."""
