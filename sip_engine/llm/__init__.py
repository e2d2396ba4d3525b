"""What judges, rewriters and corruptors share in asking a language model; knows no judge."""
