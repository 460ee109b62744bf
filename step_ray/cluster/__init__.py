"""Ray on one machine or many: joining, placing, checking, draining, logging."""
