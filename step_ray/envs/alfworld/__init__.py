"""ALFWorld (text): engines, generator, expert and judge."""
