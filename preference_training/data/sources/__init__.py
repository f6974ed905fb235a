"""Where rows lie: files of every format, folders and patterns of them, storage in the cloud, and the hub."""
