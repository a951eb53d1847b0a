"""The result tables: what they hold, and how they are made, kept, verified and summed up."""
