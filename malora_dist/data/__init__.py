"""From files of records to the microbatches of a rank: formats, tokens, tasks, order, batches."""
