"""The paper's tables in small: stages made once, rows over seeds, one page (`sip reproduce`)."""
