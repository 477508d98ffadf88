"""Adapters through which other evaluation harnesses run models of alignkd. Nothing else imports them."""
