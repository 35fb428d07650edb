"""Writes train.jsonl (240 examples) and held_out.jsonl (40) beside itself: a note in English, and its record as strict
one-line JSON. The same bytes on every run.

    {"prompt": "On Friday Nadia picked up 12 red mugs.",
     "completion": "{\\"name\\": \\"Nadia\\", \\"item\\": \\"red mugs\\", \\"amount\\": 12, \\"date\\": \\"Friday\\"}"}

No held-out note has the name and the item, or the name and the phrasing, of a training note; a quarter of them have a
name, an item and a phrasing that no training note has.
"""

import json
import random
from pathlib import Path

NAMES = """
    Nadia Omar Lucia Henrik Mei Tomas Aisha Pavel Ingrid Mateo Yuki Samir Greta Diego Priya Anton Leila Marcus Sofia
    Emil Hana Victor Zara Felix Amara Jonas Rosa Karim Elena Oscar Nina Rafael Tessa Ivan Maya Bruno Clara Idris Vera
    Hugo
"""
NEW_NAMES = "Fatima Liam Astrid Carlos Naomi Stefan Olivia Rashid Martha Daniel"
ITEMS = """
    red mugs, oak chairs, blankets, garden hoses, notebooks, silver spoons, apples, wool socks, candles, desk lamps,
    batteries, green tiles, envelopes, paint brushes, bicycles, cushions, light bulbs, tea towels, picture frames,
    screwdrivers, tulips, lemons, winter coats, pillows, flower pots, folding tables, headphones, cookbooks, umbrellas,
    rain boots, baskets, keyboards, bread rolls, plates, water bottles, ladders, gloves, postcards, cheese knives,
    shelves
"""
NEW_ITEMS = "carpets, yellow scarves, hammers, wine glasses, radios, paper bags, mirrors, coffee pots, tents, pencils"
PHRASINGS = """
    {name} bought {amount} {item} on {date}.
    On {date} {name} picked up {amount} {item}.
    {amount} {item} were delivered to {name} on {date}.
    Please send {amount} {item} to {name} by {date}.
    {name} ordered {amount} {item} for {date}.
    {name} needs {amount} {item} before {date}.
    Reminder: {name} returns {amount} {item} on {date}.
    We sold {amount} {item} to {name} on {date}.
    {name} called and wants {amount} {item} on {date}.
    By {date} we have to pack {amount} {item} for {name}.
    The {amount} {item} that {name} asked for arrive on {date}.
    Since {date} {name} has been waiting for {amount} {item}.
    {name} paid for {amount} {item} on {date}.
    Put {amount} {item} aside for {name} until {date}.
    On {date} we shipped {amount} {item} to {name}.
    {name} will collect {amount} {item} on {date}.
    There is an order of {amount} {item} from {name}, due {date}.
    {date}: {name}, {amount} {item}.
    Note that {name} borrowed {amount} {item} on {date}.
    {name} has reserved {amount} {item} from {date} on.
    {date} is when {name} gets {amount} {item}.
    Could you bring {name} {amount} {item} on {date}?
    Invoice for {name}: {amount} {item}, dated {date}.
    {name} sent back {amount} {item} last time, on {date}.
"""
NEW_PHRASINGS = """
    {name} took home {amount} {item} on {date}.
    On {date} {name} came in and asked for {amount} {item}.
    We promised {name} {amount} {item} for {date}.
    {amount} {item} go to {name} on {date}.
    Tell {name} that {amount} {item} are ready on {date}.
    {name} would like {amount} {item} by {date}.
"""
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"


def listed(text: str, separator: str | None = None) -> list[str]:
    return [" ".join(part.split()) for part in text.strip().split(separator)]


def example(rng: random.Random, name: str, item: str, phrasing: str) -> dict[str, str]:
    date = rng.choice(listed(DAYS)) if rng.random() < 0.4 else f"{rng.choice(listed(MONTHS))} {rng.randint(1, 28)}"
    values = {"name": name, "item": item, "amount": rng.randint(2, 60), "date": date}
    return {"prompt": phrasing.format(**values), "completion": json.dumps(values)}


def main() -> None:
    rng = random.Random(0)
    items, phrasings = listed(ITEMS, ","), listed(PHRASINGS, "\n")
    names, new_phrasings = listed(NAMES), listed(NEW_PHRASINGS, "\n")
    # Name i meets six items and phrasings in training, and others in the held-out notes.
    train = [
        example(rng, name, items[(7 * i + 3 * j) % 40], phrasings[(5 * i + j) % 24])
        for i, name in enumerate(names)
        for j in range(6)
    ]
    held_out = [
        example(rng, name, items[(7 * i + 3 * (6 + i % 5)) % 40], phrasings[(5 * i + 6 + i % 18) % 24])
        for i, name in enumerate(names[:30])
    ]
    new = zip(listed(NEW_NAMES), listed(NEW_ITEMS, ","))
    held_out += [example(rng, name, item, new_phrasings[i % 6]) for i, (name, item) in enumerate(new)]
    rng.shuffle(train)
    for file, examples in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        text = "".join(json.dumps(e) + "\n" for e in examples)
        (Path(__file__).parent / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
