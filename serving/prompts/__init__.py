"""Files of prompts: a picture for each line, in batches of one kind, resumed where they were stopped."""
