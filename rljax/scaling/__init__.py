"""From run folders to figures, fits and reports. Reads files, never live arrays."""
