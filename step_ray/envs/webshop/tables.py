"""Facts of WebShop that its settings and rules refer to; light, loads nothing.

Facts only, from the official code (princeton-nlp/WebShop, MIT) and Lucene's documentation.
"""

CATEGORIES = ("beauty", "electronics", "fashion", "garden", "grocery")
"""Values of a product's `category`; our task types."""
SPLITS = {"test": (0, 500), "dev": (500, 1500), "train": (1500, None)}
"""Split -> first and last (exclusive) position in the official order of the goals."""
GOAL_SEED = 233
"""Seed of the official order of the goals."""
NO_PRICE_LIMIT = 1_000_000.0
"""Upper price of a goal that names none."""
PRICE_STEPS = tuple(range(10, 1000, 10))
"""Price limits that an instruction may name, dollars."""
MAX_ASIN = 10
"""Longer ids are no products."""
DEFAULT_PRICE = 100.0
"""Price of a product without one, dollars."""
PAGE_SIZE = 10
MAX_HITS = 50
_COLOURS_TEXT = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown
burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee
cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold
granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon
leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust
sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger
turquoise violet walnut wheat white wine yellow
"""
COLOURS = tuple(_COLOURS_TEXT.split())
"""What an option is reduced to before it is compared, in the order in which they are tried."""
_STOP_WORDS_TEXT = """
a an and are as at be but by for if in into is it no not of on or such that the their then there
these they this to was will with
"""
STOP_WORDS = frozenset(_STOP_WORDS_TEXT.split())
"""Lucene's English stop words."""
