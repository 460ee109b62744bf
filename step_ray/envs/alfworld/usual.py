"""Where things usually lie in ALFWorld's rooms: the order in which an expert searches.

Gives one look-up over a constant table. The table was counted over the training games of the
released set by `jobs/usual_places.py` (facts of ALFRED, MIT licence, Shridhar et al. 2020); no
evaluation game went into it.
"""

from collections.abc import Mapping
from types import MappingProxyType

_ORDER: Mapping[str, str] = MappingProxyType(
    {
        "alarmclock": "diningtable desk countertop dresser sidetable shelf",
        "apple": "diningtable sidetable garbagecan fridge countertop sinkbasin microwave",
        "book": (
            "bed coffeetable desk diningtable countertop sofa dresser armchair sidetable"
            " cabinet drawer shelf"
        ),
        "bowl": (
            "desk coffeetable diningtable dresser tvstand fridge countertop shelf sidetable"
            " sinkbasin microwave cabinet"
        ),
        "box": (
            "diningtable desk coffeetable sofa dresser ottoman tvstand sidetable shelf"
            " armchair cabinet"
        ),
        "bread": "diningtable countertop sidetable fridge garbagecan",
        "butterknife": "diningtable countertop sidetable sinkbasin drawer",
        "candle": (
            "sidetable countertop toilet coffeetable cart tvstand diningtable dresser shelf"
            " cabinet drawer"
        ),
        "cd": "diningtable dresser desk sidetable garbagecan armchair shelf drawer cabinet safe",
        "cellphone": (
            "bed desk diningtable coffeetable ottoman dresser tvstand countertop sofa"
            " sidetable armchair safe shelf drawer"
        ),
        "cloth": "bathtubbasin dresser cart countertop shelf cabinet toilet sinkbasin drawer",
        "creditcard": (
            "desk dresser diningtable tvstand sofa countertop coffeetable sidetable armchair"
            " ottoman shelf drawer"
        ),
        "cup": "diningtable sidetable fridge sinkbasin countertop microwave shelf cabinet",
        "desklamp": "sidetable desk dresser coffeetable shelf",
        "dishsponge": (
            "bathtubbasin cart diningtable countertop toilet sinkbasin sidetable garbagecan"
            " shelf drawer cabinet"
        ),
        "egg": "diningtable sidetable garbagecan sinkbasin fridge countertop microwave",
        "floorlamp": "sinkbasin",
        "fork": "diningtable countertop sidetable sinkbasin drawer",
        "glassbottle": "diningtable countertop sinkbasin garbagecan shelf fridge cabinet",
        "handtowel": "handtowelholder countertop",
        "houseplant": "desk diningtable countertop coffeetable dresser sidetable tvstand shelf",
        "kettle": "diningtable stoveburner countertop sinkbasin cabinet shelf",
        "keychain": (
            "desk dresser coffeetable diningtable tvstand sidetable ottoman safe sofa"
            " armchair shelf drawer cabinet"
        ),
        "knife": "diningtable countertop sidetable sinkbasin drawer",
        "ladle": "diningtable countertop sinkbasin drawer cabinet",
        "laptop": (
            "bed countertop diningtable desk coffeetable sofa tvstand dresser ottoman"
            " armchair sidetable"
        ),
        "lettuce": "diningtable countertop sidetable fridge sinkbasin garbagecan",
        "mug": (
            "desk coffeemachine dresser diningtable sidetable countertop fridge sinkbasin"
            " microwave shelf cabinet"
        ),
        "newspaper": (
            "diningtable dresser coffeetable sofa ottoman sidetable armchair tvstand shelf drawer"
        ),
        "pan": "countertop stoveburner diningtable fridge cabinet",
        "pen": (
            "desk diningtable coffeetable dresser countertop sidetable tvstand shelf"
            " garbagecan drawer"
        ),
        "pencil": (
            "diningtable desk coffeetable dresser sidetable countertop tvstand shelf"
            " garbagecan drawer"
        ),
        "peppershaker": "sidetable diningtable countertop shelf drawer cabinet",
        "pillow": "bed sofa armchair",
        "plate": (
            "diningtable coffeetable countertop tvstand dresser sidetable fridge shelf"
            " sinkbasin cabinet microwave"
        ),
        "pot": "stoveburner countertop diningtable fridge shelf sinkbasin",
        "potato": "diningtable countertop sidetable fridge sinkbasin garbagecan microwave",
        "remotecontrol": (
            "countertop desk coffeetable dresser tvstand diningtable sofa ottoman sidetable"
            " armchair shelf drawer"
        ),
        "saltshaker": "diningtable sidetable countertop shelf cabinet drawer",
        "soapbar": (
            "sidetable countertop bathtubbasin cart toilet sinkbasin shelf garbagecan cabinet"
            " drawer"
        ),
        "soapbottle": (
            "diningtable dresser toilet countertop sidetable cart garbagecan shelf cabinet"
        ),
        "spatula": "diningtable countertop sinkbasin sidetable drawer",
        "spoon": "diningtable sidetable countertop sinkbasin drawer",
        "spraybottle": (
            "sidetable cart toilet countertop dresser diningtable shelf garbagecan cabinet"
        ),
        "statue": "coffeetable desk diningtable dresser tvstand countertop sidetable shelf",
        "television": "dresser tvstand coffeetable sidetable",
        "tissuebox": (
            "coffeetable desk countertop diningtable cart tvstand shelf sidetable dresser"
            " cabinet toilet drawer garbagecan"
        ),
        "toiletpaper": (
            "toilet sidetable countertop dresser cart toiletpaperhanger shelf garbagecan"
            " cabinet drawer"
        ),
        "tomato": "diningtable sidetable fridge countertop garbagecan sinkbasin",
        "towel": "towelholder countertop",
        "vase": "dresser coffeetable desk diningtable tvstand countertop sidetable shelf cabinet",
        "watch": "tvstand desk diningtable dresser coffeetable sidetable shelf drawer",
        "wateringcan": "coffeetable shelf sidetable",
        "winebottle": "diningtable countertop garbagecan shelf cabinet fridge",
    }
)
"""Object class -> receptacle classes, those first that are most worth a look."""

_RANKS = {
    kind: {place: rank for rank, place in enumerate(order.split())}
    for kind, order in _ORDER.items()
}


def search_rank(thing: str, place: str) -> int:
    """How late a `thing` is looked for in a receptacle of class `place`; ties are common.

    Args:
        thing: class of the object, or of a receptacle that is looked for (any order is as good).
        place: class of the receptacle.
    """
    ranks = _RANKS.get(thing, {})
    return ranks.get(place, len(ranks))
