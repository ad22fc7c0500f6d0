"""Commands that print figures. Nothing here is imported by the product, and no test is timed."""
