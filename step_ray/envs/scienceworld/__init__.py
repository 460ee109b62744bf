"""ScienceWorld: worlds in one Java machine, gold paths, expert and judge."""
