"""What evaluated episodes say: scores, intervals, paired tests, behaviour."""
