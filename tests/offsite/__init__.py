"""Offsite-Tuning between its two sides: emulators that are shipped, adapters that are handed in."""
