"""What a run cost, by side and phase: counted, merged, written down."""
