"""Facts about ALFRED's household classes: what may lie where, what can be done to it, how often.

Gives constants and two look-ups; never draws anything and imports nothing of the alfworld package.
The facts are ALFRED's (MIT licence, Shridhar et al. 2020): `HOLDS` and the property sets agree with
every `canContain`, `openable`, `cleanable`, ... fact of the 3,828 released ALFWorld games, and the
rates are averages over those games.
"""

from collections.abc import Mapping
from types import MappingProxyType

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
ROOMS = ("Kitchen", "LivingRoom", "Bedroom", "Bathroom")
SPLITS = ("train", "valid_seen", "valid_unseen", "pretrain")
"""The released splits, and one to pretrain a tiny base model on; their order fixes the games."""

TASK_ROOMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pick_and_place_simple": ROOMS,
        "look_at_obj_in_light": ("LivingRoom", "Bedroom"),
        "pick_clean_then_place_in_recep": ("Kitchen", "Bathroom"),
        "pick_heat_then_place_in_recep": ("Kitchen",),
        "pick_cool_then_place_in_recep": ("Kitchen",),
        "pick_two_obj_and_place": ROOMS,
    }
)
"""Rooms in which the released games of a task type are set."""

FIRST_FLOOR: Mapping[str, int] = MappingProxyType(
    {"Kitchen": 1, "LivingRoom": 201, "Bedroom": 301, "Bathroom": 401}
)
"""Thirty floor plans per room kind, numbered from here."""


def _classes(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _rates(text: str) -> Mapping[str, float]:
    words = text.split()
    return MappingProxyType(
        {name: float(rate) for name, rate in zip(words[::2], words[1::2], strict=True)}
    )


PROPERTIES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "cleanable": _classes(
            "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug"
            " Pan Plate Pot Potato SoapBar Spatula Spoon Tomato"
        ),
        "heatable": _classes("Apple Bread Cup Egg Mug Plate Potato Tomato"),
        "coolable": _classes(
            "Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle"
        ),
        "toggleable": _classes("DeskLamp FloorLamp"),
        "sliceable": _classes("Apple Bread Egg Lettuce Potato Tomato"),
        "isReceptacleObject": _classes("Bowl Box Cup Mug Pan Plate Pot"),
    }
)
"""Predicate -> object classes that carry it."""

FIXED_OBJECTS = _classes("DeskLamp FloorLamp HousePlant Television")
"""Objects that lie in receptacles but cannot be picked up."""

OPENABLE_RATE = _rates("Cabinet 0.82 Drawer 0.84 Fridge 1 Microwave 1 Safe 0.87")
"""Share of the instances that can be opened (and start closed); all other classes never can."""

TASK_PROPERTY: Mapping[str, str] = MappingProxyType(
    {
        "pick_clean_then_place_in_recep": "cleanable",
        "pick_heat_then_place_in_recep": "heatable",
        "pick_cool_then_place_in_recep": "coolable",
    }
)
TASK_TOOL: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "pick_clean_then_place_in_recep": ("clean", "SinkBasin"),
        "pick_heat_then_place_in_recep": ("heat", "Microwave"),
        "pick_cool_then_place_in_recep": ("cool", "Fridge"),
    }
)
"""Task type -> (verb, receptacle class that does it); that class is never the destination."""

NEVER_DESTINATIONS = _classes("HandTowelHolder LaundryHamper SinkBasin TVStand TowelHolder")
"""Receptacle classes that no released game asks to put something in."""

GOAL_TEXTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "pick_and_place_simple": ("put a {obj} in {recep}", "put some {obj} on {recep}"),
        "look_at_obj_in_light": (
            "look at {obj} under the {lamp}",
            "examine the {obj} with the {lamp}",
        ),
        "pick_clean_then_place_in_recep": (
            "put a clean {obj} in {recep}",
            "clean some {obj} and put it in {recep}",
        ),
        "pick_heat_then_place_in_recep": (
            "put a hot {obj} in {recep}",
            "heat some {obj} and put it in {recep}",
        ),
        "pick_cool_then_place_in_recep": (
            "put a cool {obj} in {recep}",
            "cool some {obj} and put it in {recep}",
        ),
        "pick_two_obj_and_place": (
            "put two {obj} in {recep}",
            "find two {obj} and put them in {recep}",
        ),
    }
)
"""The two sentence forms of each task type, used about equally often in the released games."""

LAMP_HOSTS = _classes("CoffeeTable Desk Dresser Shelf SideTable")
"""Where desk lamps stand; floor lamps stand in no receptacle, so they are never a task's lamp."""

HOLDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "ArmChair": _classes(
            "Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow RemoteControl"
        ),
        "BathtubBasin": _classes("Cloth DishSponge HandTowel SoapBar"),
        "Bed": _classes("BaseballBat BasketBall Book CellPhone Laptop Pillow TennisRacket"),
        "Cabinet": _classes(
            "Book Bowl Box CD Candle Cloth Cup DishSponge Glassbottle HandTowel Kettle Ladle Mug"
            " Newspaper Pan PepperShaker Plate Plunger Pot SaltShaker SoapBar SoapBottle"
            " SprayBottle TissueBox ToiletPaper Vase WateringCan WineBottle"
        ),
        "Cart": _classes(
            "Candle Cloth DishSponge HandTowel Plunger SoapBar SoapBottle SprayBottle TissueBox"
            " ToiletPaper"
        ),
        "CoffeeMachine": _classes("Mug"),
        "CoffeeTable": _classes(
            "Book Bowl Box Candle CellPhone CreditCard KeyChain Laptop Newspaper Pen Pencil Plate"
            " RemoteControl Statue TissueBox Vase Watch WateringCan"
        ),
        "CounterTop": _classes(
            "AlarmClock Apple Book Bowl Bread ButterKnife CD Candle CellPhone Cloth CreditCard"
            " Cup DishSponge Egg Fork Glassbottle HandTowel Kettle KeyChain Knife Ladle Laptop"
            " Lettuce Mug Pan Pen Pencil PepperShaker Plate Pot Potato RemoteControl SaltShaker"
            " SoapBar SoapBottle Spatula Spoon SprayBottle Statue TissueBox ToiletPaper Tomato"
            " Vase WineBottle"
        ),
        "Desk": _classes(
            "AlarmClock BasketBall Book Bowl Box CD CellPhone Cloth CreditCard KeyChain Laptop"
            " Mug Pen Pencil RemoteControl Statue TennisRacket TissueBox Vase Watch WateringCan"
        ),
        "DiningTable": _classes(
            "AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD Candle"
            " CellPhone Cloth CreditCard Cup DishSponge Egg Fork Glassbottle Kettle KeyChain Knife"
            " Ladle Laptop Lettuce Mug Newspaper Pan Pen Pencil PepperShaker Plate Pot Potato"
            " RemoteControl SaltShaker SoapBottle Spatula Spoon SprayBottle Statue TennisRacket"
            " TissueBox Tomato Vase Watch WateringCan WineBottle"
        ),
        "Drawer": _classes(
            "Book ButterKnife CD Candle CellPhone Cloth CreditCard DishSponge Fork HandTowel"
            " KeyChain Knife Ladle Newspaper Pen Pencil PepperShaker RemoteControl SaltShaker"
            " SoapBar SoapBottle Spatula Spoon SprayBottle TissueBox ToiletPaper Watch WateringCan"
        ),
        "Dresser": _classes(
            "AlarmClock BasketBall Book Bowl Box CD Candle CellPhone Cloth CreditCard KeyChain"
            " Laptop Mug Newspaper Pen Pencil Plate RemoteControl SprayBottle Statue TennisRacket"
            " TissueBox ToiletPaper Vase Watch WateringCan"
        ),
        "Fridge": _classes(
            "Apple Bowl Bread Cup Egg Glassbottle Lettuce Mug Pan Plate Pot Potato Tomato"
            " WineBottle"
        ),
        "GarbageCan": _classes(
            "Apple Bread CD Cloth DishSponge Egg HandTowel Lettuce Newspaper Pen Pencil Potato"
            " SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Tomato WineBottle"
        ),
        "HandTowelHolder": _classes("HandTowel"),
        "LaundryHamper": _classes("Cloth"),
        "Microwave": _classes("Apple Bowl Bread Cup Egg Glassbottle Mug Plate Potato Tomato"),
        "Ottoman": _classes(
            "Book Box CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl"
        ),
        "Safe": _classes("CD CellPhone CreditCard KeyChain Statue Vase Watch"),
        "Shelf": _classes(
            "AlarmClock Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup DishSponge"
            " Glassbottle HandTowel Kettle KeyChain Mug Newspaper Pen Pencil PepperShaker Plate"
            " Pot RemoteControl SaltShaker SoapBar SoapBottle SprayBottle Statue TissueBox"
            " ToiletPaper Vase Watch WateringCan WineBottle"
        ),
        "SideTable": _classes(
            "AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD Candle"
            " CellPhone Cloth CreditCard Cup DishSponge Egg Fork HandTowel Kettle KeyChain Knife"
            " Laptop Lettuce Mug Newspaper Pan Pen Pencil PepperShaker Plate Pot Potato"
            " RemoteControl SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle Statue"
            " TennisRacket TissueBox ToiletPaper Tomato Vase Watch WateringCan WineBottle"
        ),
        "SinkBasin": _classes(
            "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Glassbottle HandTowel Kettle"
            " Knife Ladle Lettuce Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato"
        ),
        "Sofa": _classes(
            "Book Box CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl"
        ),
        "StoveBurner": _classes("Kettle Pan Pot"),
        "TVStand": _classes("TissueBox"),
        "Toaster": _classes(""),
        "Toilet": _classes(
            "Candle Cloth DishSponge HandTowel SoapBar SoapBottle SprayBottle TissueBox ToiletPaper"
        ),
        "ToiletPaperHanger": _classes("ToiletPaper"),
        "TowelHolder": _classes("Towel"),
    }
)
"""Receptacle class -> classes of the objects that may be put in it (the `canContain` facts)."""

_FIXED_HOSTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "DeskLamp": LAMP_HOSTS,
        "HousePlant": _classes(
            "CoffeeTable CounterTop Desk DiningTable Dresser SideTable Shelf TVStand"
        ),
        "Television": _classes("CoffeeTable Dresser SideTable TVStand"),
    }
)


def may_hold(receptacle: str, obj: str) -> bool:
    """Whether objects of class `obj` may lie in a `receptacle` (a class) at the start."""
    if obj in _FIXED_HOSTS:
        return receptacle in _FIXED_HOSTS[obj]
    return obj in HOLDS[receptacle]


LOAD = _rates(
    "ArmChair 0.87 BathtubBasin 1.42 Bed 4.07 Cabinet 0.45 Cart 3.19 CoffeeMachine 0.39"
    " CoffeeTable 4.32 CounterTop 6.17 Desk 6.15 DiningTable 9.29 Drawer 0.52 Dresser 4.55 Fridge"
    " 4.29 GarbageCan 0.85 HandTowelHolder 0.79 LaundryHamper 0.1 Microwave 1.05 Ottoman 1.07 Safe"
    " 0.62 Shelf 1.04 SideTable 2.66 SinkBasin 1.65 Sofa 2.46 StoveBurner 0.49 TVStand 3.57"
    " Toaster 0.1 Toilet 2.43 ToiletPaperHanger 0.23 TowelHolder 0.87"
)
"""Mean number of objects in a receptacle of the class: the weight when an object is placed."""

CORE_RECEPTACLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Kitchen": ("CounterTop", "Fridge", "Microwave", "SinkBasin"),
        "LivingRoom": ("CoffeeTable", "SideTable", "Sofa"),
        "Bedroom": ("Bed", "Desk"),
        "Bathroom": ("SinkBasin", "Toilet"),
    }
)
"""What every room has whatever its size, so that each of the room's task types can be set there."""

RECEPTACLE_RATES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "Kitchen": _rates(
            "Cabinet 13.7 CoffeeMachine 1 CounterTop 2.4 DiningTable 0.7 Drawer 5.8 Fridge 1"
            " GarbageCan 1 Microwave 1 Safe 0.05 Shelf 0.5 SideTable 0.1 SinkBasin 1 StoveBurner"
            " 4.1 Toaster 1"
        ),
        "LivingRoom": _rates(
            "ArmChair 1.3 Cabinet 0.6 CoffeeTable 1 Desk 0.05 DiningTable 0.6 Drawer 4 Dresser"
            " 0.4 GarbageCan 1 Ottoman 0.1 Safe 0.1 Shelf 2.7 SideTable 1.5 Sofa 1.2 TVStand 0.5"
        ),
        "Bedroom": _rates(
            "ArmChair 0.3 Bed 1.1 Cabinet 0.4 CounterTop 0.05 Desk 0.8 DiningTable 0.1 Drawer 5.9"
            " Dresser 0.5 GarbageCan 1 LaundryHamper 0.3 Safe 0.2 Shelf 3.2 SideTable 0.9"
        ),
        "Bathroom": _rates(
            "BathtubBasin 0.7 Cabinet 2.1 Cart 0.1 CounterTop 1 Drawer 2.4 Dresser 0.1 GarbageCan"
            " 1 HandTowelHolder 1.5 Shelf 0.5 SideTable 0.1 SinkBasin 1.5 Toilet 1"
            " ToiletPaperHanger 1 TowelHolder 1.3"
        ),
    }
)
"""Mean number of receptacles of a class in a room."""

SINGLE_RECEPTACLES = _classes(
    "BathtubBasin Cart CoffeeMachine Fridge GarbageCan LaundryHamper Microwave Ottoman Safe"
    " Toaster Toilet ToiletPaperHanger"
)
"""Classes of which no room has two."""

OBJECT_RATES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "Kitchen": _rates(
            "Apple 2 Book 0.2 Bowl 2 Bread 1.6 ButterKnife 1.8 CellPhone 0.3 CreditCard 0.3 Cup 2"
            " DishSponge 2 Egg 2 Fork 1.9 Glassbottle 0.5 HousePlant 0.4 Kettle 0.9 Knife 1.8"
            " Ladle 0.6 Lettuce 1.8 Mug 2.2 Pan 1.8 PepperShaker 2.1 Plate 1.7 Pot 1.9 Potato 1.9"
            " SaltShaker 2 SoapBottle 1.9 Spatula 1.9 Spoon 1.9 SprayBottle 0.1 Statue 0.3 Tomato"
            " 2 Vase 0.5 WineBottle 0.8"
        ),
        "LivingRoom": _rates(
            "Book 0.5 Bowl 0.2 Box 1.2 Candle 0.2 CellPhone 0.5 CreditCard 2.1 DeskLamp 0.2"
            " HousePlant 0.6 KeyChain 1.6 Laptop 1.4 Newspaper 1.2 Pen 0.4 Pencil 0.3 Pillow 1.1"
            " Plate 0.6 RemoteControl 1.9 Statue 2.2 Television 0.7 TissueBox 0.7 Vase 1.5 Watch"
            " 1.1 WateringCan 0.1"
        ),
        "Bedroom": _rates(
            "AlarmClock 1.7 Book 1.9 Bowl 0.8 Box 0.1 CD 1.8 CellPhone 2.1 CreditCard 2 DeskLamp"
            " 0.8 HousePlant 0.3 KeyChain 2 Laptop 1.6 Mug 1 Pen 2.1 Pencil 2 Pillow 1.7"
            " RemoteControl 0.2 Statue 0.2 TissueBox 0.2 Vase 0.1 Watch 0.1"
        ),
        "Bathroom": _rates(
            "Candle 1.9 Cloth 1.9 DishSponge 0.5 HandTowel 1.2 SoapBar 1.9 SoapBottle 1.8"
            " SprayBottle 2 TissueBox 0.5 ToiletPaper 2 Towel 1.2"
        ),
    }
)
"""Mean number of objects of a class that lie in a room's receptacles."""

MAX_PER_CLASS = 4
"""No released game places more objects of one class than about this many."""

FULL_SIZES: Mapping[str, tuple[int, int, int, int]] = MappingProxyType(
    {
        "Kitchen": (20, 54, 28, 64),
        "LivingRoom": (6, 35, 10, 41),
        "Bedroom": (7, 27, 14, 35),
        "Bathroom": (10, 21, 9, 24),
    }
)
"""Room -> fewest and most receptacles, fewest and most objects in receptacles."""
