"""Who is who: certificates, identities and signatures."""
