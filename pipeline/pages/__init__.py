"""What a person looks at: pages that stand alone."""
