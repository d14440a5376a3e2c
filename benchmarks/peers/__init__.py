"""The same update by this toolkit and by others, measured side by side."""
