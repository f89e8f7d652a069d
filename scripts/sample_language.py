"""The small language that the shipped sample model and sample data share.

A sample that runs without a hub needs text that anyone may copy, so all of it is made up here: a
`Fact` (who, what, how much, when, where, for how much money), the ways in which people write each
part of it, and sentences that state it. `make_sample_model.py` teaches a base model to read and
rewrite such sentences; `make_sample_data.py` asks for something that it was never taught, one
ledger line. What both need is here; what only the target task may contain (its instruction and its
format) is in `make_sample_data.py`, which keeps it out of the base model's training text.

Everything is drawn from a `random.Random` that the caller passes, so a seed gives the same text on
every machine.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MONTHS = _words(
    "January February March April May June July August September October November December"
)

FIRST_NAMES = _words(
    "Anna Omar Zoë José Mei Lars Priya Ivan Sofia Kofi Elena Hugo Aisha Tom Ingrid Marco Leila "
    "Paul Nina Samuel Clara Yusuf Greta Daniel Rosa Felix Åsa Victor Hana Peter Maria David Ruth "
    "Nils Olga Simon Tara Erik Julia Adam"
)

LAST_NAMES = _words(
    "Lind Haddad Novak Müller Tanaka Berg Patel Costa Okafor Weber Rossi Jansen Silva Moreau Kaya "
    "Fischer Nowak Santos Larsen Petrov Keller Mensah Ito Svensson Dubois Romano Wagner Olsen Cruz "
    "Horvat Bauer Marsh Walker Fraser Nkosi Adler Stone Wells Carter Young"
)

COMPANIES = (
    "Northgate Timber",
    "Blue Harbour Foods",
    "Lind and Sons",
    "Silverline Transport",
    "Green Valley Farm",
    "Bright Print Studio",
    "Old Mill Bakery",
    "Westend Motors",
    "Castle Hill School",
    "Riverside Clinic",
    "Granite Works",
    "Polar Ice Company",
    "Sunrise Textiles",
    "Kaya Brothers",
    "Harbour Street Hotel",
    "Oak Lane Library",
)

PLACES = _words(
    "Lund Oslo Porto Ghent Lyon Turin Graz Bern Cork Leeds Gdansk Tartu Split Izmir Malmö Bergen "
    "Utrecht Dresden Seville Verona"
)


@dataclass(frozen=True)
class Unit:
    """A unit as it is written out (always plural here) and in short, and what it measures."""

    long: str
    short: str
    goods: tuple[str, ...]
    fractional: bool


_MASS = _words("flour rice sugar coffee salt apples potatoes cement sand steel wool copper")
_VOLUME = _words("milk paint oil water vinegar juice diesel syrup")
_LENGTH = _words("cable rope fabric pipe fence carpet ribbon wire")
_WORK = _words("cleaning translation teaching repairs gardening driving painting design")
_COUNT = _words("candles chairs books lamps bottles shirts tiles plates")

UNITS = (
    Unit("kilograms", "kg", _MASS, True),
    Unit("grams", "g", _MASS, False),
    Unit("tonnes", "t", _MASS, True),
    Unit("litres", "l", _VOLUME, True),
    Unit("millilitres", "ml", _VOLUME, False),
    Unit("metres", "m", _LENGTH, True),
    Unit("centimetres", "cm", _LENGTH, False),
    Unit("hours", "h", _WORK, True),
    Unit("minutes", "min", _WORK, False),
    Unit("days", "d", _WORK, True),
    Unit("boxes", "bx", _COUNT, False),
    Unit("pieces", "pcs", _COUNT, False),
)

# Currency code -> the word that people write after an amount.
CURRENCIES = {
    "EUR": "euros",
    "USD": "dollars",
    "GBP": "pounds",
    "SEK": "kronor",
    "CHF": "francs",
    "PLN": "zlotys",
}


@dataclass(frozen=True)
class Fact:
    """One transaction. Quantities are in tenths of the unit and money in cents: no floats."""

    date: datetime.date
    party: str
    quantity_tenths: int
    unit: Unit
    item: str
    amount_cents: int
    currency: str
    place: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes two facts the same for the split: date, amount, unit and name."""
        return (iso_date(self.date), money(self), self.unit.short, self.party)


def draw_fact(random: Random) -> Fact:
    """Draw one fact; each part is independent but for the goods, which suit the unit."""
    unit = random.choice(UNITS)
    if unit.fractional and random.random() < 0.5:
        tenths = random.randint(11, 999)
    else:
        tenths = 10 * random.randint(2, random.choice((20, 99, 999)))
    amount = random.randint(2, random.choice((99, 999, 9999))) * 100
    if random.random() < 0.6:
        amount += random.choice((random.randint(1, 99), 50, 25, 90))
    if random.random() < 0.7:
        party = f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"
    else:
        party = random.choice(COMPANIES)
    return Fact(
        date=datetime.date(2015, 1, 1) + datetime.timedelta(days=random.randrange(365 * 12)),
        party=party,
        quantity_tenths=tenths,
        unit=unit,
        item=random.choice(unit.goods),
        amount_cents=amount,
        currency=random.choice(tuple(CURRENCIES)),
        place=random.choice(PLACES),
    )


# ---- The fixed ways to write a part -------------------------------------------------------------


def iso_date(date: datetime.date) -> str:
    """2021-03-03."""
    return date.isoformat()


def quantity_number(fact: Fact) -> str:
    """12.5, or 12 where there are no tenths."""
    whole, tenths = divmod(fact.quantity_tenths, 10)
    return f"{whole}.{tenths}" if tenths else str(whole)


def quantity(fact: Fact) -> str:
    """12.5 kg."""
    return f"{quantity_number(fact)} {fact.unit.short}"


def money(fact: Fact) -> str:
    """EUR 340.00: the code, no thousands separator, always two decimals."""
    return f"{fact.currency} {fact.amount_cents // 100}.{fact.amount_cents % 100:02d}"


_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")


def number_words(number: int) -> str:
    """Write 0 <= number < 100 in words.

    Raises:
        ValueError: outside that range, for which the sample language has no words.
    """
    if not 0 <= number < 100:
        raise ValueError(f"the sample language has words for 0 to 99, not for {number}")
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


# ---- The many ways in which people write it -----------------------------------------------------


def _ordinal(day: int) -> str:
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def written_date(random: Random, date: datetime.date) -> str:
    """A date as in a letter, in one of five forms."""
    month = MONTHS[date.month - 1]
    forms = (
        f"{date.day} {month} {date.year}",
        f"{month} {date.day}, {date.year}",
        f"the {_ordinal(date.day)} of {month} {date.year}",
        f"{date.day} {month[:3]} {date.year}",
        f"{date.day}.{date.month}.{date.year}",
    )
    return random.choice(forms)


def written_quantity(random: Random, fact: Fact) -> str:
    """A quantity with its unit: in words when it is small and whole, else in digits."""
    whole, tenths = divmod(fact.quantity_tenths, 10)
    if not tenths and whole < 100 and random.random() < 0.3:
        return f"{number_words(whole)} {fact.unit.long}"
    unit = fact.unit.long if random.random() < 0.75 else fact.unit.short
    return f"{quantity_number(fact)} {unit}"


def written_money(random: Random, fact: Fact) -> str:
    """An amount: code first or word last, cents left out when there are none, maybe commas."""
    whole, cents = divmod(fact.amount_cents, 100)
    word = CURRENCIES[fact.currency]
    if not cents and whole < 100 and random.random() < 0.3:
        return f"{number_words(whole)} {word}"
    digits = f"{whole:,}" if random.random() < 0.5 else str(whole)
    if cents or random.random() < 0.3:
        digits += f".{cents:02d}"
    return f"{fact.currency} {digits}" if random.random() < 0.3 else f"{digits} {word}"


@dataclass(frozen=True)
class Statement:
    """A sentence about a fact, and the parts exactly as it writes them."""

    fact: Fact
    sentence: str
    date: str
    quantity: str
    money: str


# {q} quantity, {i} item, {m} money, {d} date, {p} party, {l} place.
_SENTENCES = (
    "On {d}, {p} bought {q} of {i} for {m}.",
    "{p} bought {q} of {i} on {d} and paid {m}.",
    "{p} paid {m} for {q} of {i} on {d}.",
    "We sold {q} of {i} to {p} on {d} for {m}.",
    "We received {m} from {p} on {d} for {q} of {i}.",
    "The invoice of {d} to {p} is for {q} of {i}, {m} in total.",
    "{p} ordered {q} of {i} from {l} on {d}; the price was {m}.",
    "On {d} we delivered {q} of {i} to {p} in {l} and charged {m}.",
    "For {m}, {p} got {q} of {i} in {l} on {d}.",
    "{q} of {i} went to {p} in {l} on {d} at a price of {m}.",
    "A bill of {m} was sent to {p} on {d} for {q} of {i}.",
    "Dear {p}, thank you for your order of {d}: {q} of {i} for {m}.",
    "{p} in {l} asked for {q} of {i}, paid {m} and got it on {d}.",
    "It cost {p} {m} to get {q} of {i} on {d}.",
    "{d}: {q} of {i} for {p}, {m}.",
    "According to the receipt of {d}, {p} took {q} of {i} and left {m}.",
)

# Said after the sentence now and then; each adds something that no field holds.
_REMARKS: tuple[Callable[[Random], str], ...] = (
    lambda random: "It was paid in cash.",
    lambda random: "It was paid by card.",
    lambda random: f"The order number is {random.randint(1000, 9999)}.",
    lambda random: f"The van came at {random.randint(7, 18)}:{random.choice(('00', '15', '30'))}.",
    lambda random: f"{random.choice(FIRST_NAMES)} signed for it.",
    lambda random: f"The goods came from {random.choice(PLACES)}.",
    lambda random: "Nothing is left to pay.",
)


def state(random: Random, fact: Fact) -> Statement:
    """Write `fact` as one sentence, sometimes with a remark behind it."""
    date = written_date(random, fact.date)
    amount = written_quantity(random, fact)
    price = written_money(random, fact)
    sentence = random.choice(_SENTENCES).format(
        d=date, q=amount, m=price, p=fact.party, i=fact.item, l=fact.place
    )
    sentence = sentence[0].upper() + sentence[1:]
    if random.random() < 0.3:
        sentence += " " + random.choice(_REMARKS)(random)
    return Statement(fact, sentence, date, amount, price)
