"""Where scans come from and how they are read: files, folders, splits, downloads, checks, and the phantom."""
