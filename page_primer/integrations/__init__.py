"""One module per framework: when to prime, where the options come from, who logs the report."""
