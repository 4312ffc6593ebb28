"""From a torch component to an engine: export, parity, layout."""
