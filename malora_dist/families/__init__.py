"""Model families: what is Llama's, from the config check to the table of tensors."""
