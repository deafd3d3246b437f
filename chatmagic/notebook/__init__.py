"""What a notebook has beyond Python: `%%chat` and its kin."""
