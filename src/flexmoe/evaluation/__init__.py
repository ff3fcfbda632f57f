"""How good every budget is: text, minimal pairs, tasks and answers, beside the base."""
