"""Finished KV blocks, kept in tiers by what they were computed from, and found again by whoever needs the same."""
