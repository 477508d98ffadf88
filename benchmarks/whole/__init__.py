"""A whole run, from ``alignkd launch`` to done, beside the floor's steps with a plain AdamW."""
