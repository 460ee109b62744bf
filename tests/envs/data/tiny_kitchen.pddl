; A hand-written kitchen for the engine tests. GOAL is replaced by the test.
; The two counters share one place; the bowl stands in the fridge with the spoon in it.
(define (problem tiny_kitchen)
(:domain alfred)
(:objects
    agent1 - agent
    AppleType KnifeType ButterKnifeType BowlType SpoonType LaptopType DeskLampType - otype
    CounterTopType FridgeType MicrowaveType SinkType SinkBasinType SideTableType - rtype
    Apple_bar_1 Apple_bar_2 Knife_bar_1 Bowl_bar_1 Spoon_bar_1 Laptop_bar_1 - object
    DeskLamp_bar_1 - object
    CounterTop_bar_1 CounterTop_bar_2 Fridge_bar_1 Microwave_bar_1 - receptacle
    Sink_bar_1_bar_SinkBasin SideTable_bar_1 - receptacle
    loc_bar_start loc_bar_counter loc_bar_fridge loc_bar_oven loc_bar_sink loc_bar_table - location
)
(:init
    (atLocation agent1 loc_bar_start)
    (receptacleType CounterTop_bar_1 CounterTopType)
    (receptacleType CounterTop_bar_2 CounterTopType)
    (receptacleType Fridge_bar_1 FridgeType)
    (receptacleType Microwave_bar_1 MicrowaveType)
    (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
    (receptacleType SideTable_bar_1 SideTableType)
    (receptacleAtLocation CounterTop_bar_1 loc_bar_counter)
    (receptacleAtLocation CounterTop_bar_2 loc_bar_counter)
    (receptacleAtLocation Fridge_bar_1 loc_bar_fridge)
    (receptacleAtLocation Microwave_bar_1 loc_bar_oven)
    (receptacleAtLocation Sink_bar_1_bar_SinkBasin loc_bar_sink)
    (receptacleAtLocation SideTable_bar_1 loc_bar_table)
    (openable Fridge_bar_1) (openable Microwave_bar_1) (opened Microwave_bar_1)
    (objectType Apple_bar_1 AppleType) (objectType Apple_bar_2 AppleType)
    (objectType Knife_bar_1 KnifeType) (objectType Bowl_bar_1 BowlType)
    (objectType Spoon_bar_1 SpoonType) (objectType Laptop_bar_1 LaptopType)
    (objectType DeskLamp_bar_1 DeskLampType)
    (pickupable Apple_bar_1) (pickupable Apple_bar_2) (pickupable Knife_bar_1)
    (pickupable Bowl_bar_1) (pickupable Spoon_bar_1) (pickupable Laptop_bar_1)
    (sliceable Apple_bar_1) (cleanable Apple_bar_1) (heatable Apple_bar_1) (coolable Apple_bar_1)
    (toggleable DeskLamp_bar_1) (toggleable Laptop_bar_1)
    (isReceptacleObject Bowl_bar_1) (inReceptacleObject Spoon_bar_1 Bowl_bar_1)
    (inReceptacle Apple_bar_1 CounterTop_bar_1) (inReceptacle Knife_bar_1 CounterTop_bar_1)
    (inReceptacle Apple_bar_2 Fridge_bar_1) (inReceptacle Bowl_bar_1 Fridge_bar_1)
    (inReceptacle Spoon_bar_1 Fridge_bar_1)
    (inReceptacle Laptop_bar_1 SideTable_bar_1) (inReceptacle DeskLamp_bar_1 SideTable_bar_1)
    (objectAtLocation Apple_bar_1 loc_bar_counter) (objectAtLocation Knife_bar_1 loc_bar_counter)
    (objectAtLocation Apple_bar_2 loc_bar_fridge) (objectAtLocation Bowl_bar_1 loc_bar_fridge)
    (objectAtLocation Spoon_bar_1 loc_bar_fridge)
    (objectAtLocation Laptop_bar_1 loc_bar_table) (objectAtLocation DeskLamp_bar_1 loc_bar_table)
    (canContain CounterTopType AppleType) (canContain CounterTopType KnifeType)
    (canContain FridgeType AppleType) (canContain FridgeType BowlType)
    (canContain MicrowaveType AppleType) (canContain SinkBasinType AppleType)
    (canContain SideTableType LaptopType) (canContain SideTableType AppleType)
)
(:goal GOAL)
)
