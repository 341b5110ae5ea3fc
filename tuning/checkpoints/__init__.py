"""Where weights come from, and folders of UNets read and written."""
