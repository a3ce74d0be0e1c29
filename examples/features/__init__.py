"""Features found among many: what a search certifies, on noise and on the ASU sets."""
