"""Every picture, of records that checkpoint/ and measure/ make. Pillow is imported here and nowhere else."""
