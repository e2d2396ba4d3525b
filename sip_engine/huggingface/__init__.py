"""Models of the Llama and Qwen families, to and from the folders that transformers reads."""
