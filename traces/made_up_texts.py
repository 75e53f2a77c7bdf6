"""Texts made up by code: JSON, server logs, conversations and stories in three other languages.

No model was trained on them and nobody owns them. A document keeps to a small cast (a few people,
places, customers or requests) whose names and numbers come back, so that there is something to look
up far behind. Words of the languages are everyday ones; sentences are simple and correct.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

_PARAGRAPHS = 40


@dataclass(frozen=True)
class _Language:
    """Sentences with gaps, and what goes into these."""

    sentences: tuple[str, ...]
    names: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]


_LANGUAGES = (
    _Language(
        (
            "Am {n}. Tag des Jahres nahm {a} {thing} und fuhr nach {place}.",
            "{a} fragte {b}, ob der Zug {n} nach {place} schon abgefahren sei.",
            "In {place} bekam man {thing} damals für {n} Mark, sagte {b}.",
            "Niemand außer {a} wusste, dass {b} in Haus Nummer {n} in {place} wohnte.",
            "Weil es regnete, wartete {b} {n} Minuten am Bahnhof von {place}.",
            "{a} hatte {thing} vergessen und musste {n} Schritte zurückgehen.",
            "Später schrieb {b} einen Brief über {thing}, der {n} Zeilen lang war.",
            "„Gib mir {thing}“, rief {a}, „wir haben noch {n} Kilometer bis {place}!“",
        ),
        ("Anna", "Jürgen", "Lena", "Matthias", "Sabine", "Uwe", "Heike", "Konrad"),
        ("Lübeck", "Passau", "Görlitz", "Trier", "Husum", "Bamberg", "Zwickau", "Soest"),
        ("das Fahrrad", "den Koffer", "die Lampe", "das Buch", "den Schlüssel", "die Uhr"),
    ),
    _Language(
        (
            "Le {n}e jour de l'année, {a} partit pour {place} avec {thing}.",
            "{a} demanda à {b} si le train {n} pour {place} était déjà parti.",
            "À {place}, {thing} ne coûtait alors que {n} francs, disait {b}.",
            "Personne, sauf {a}, ne savait que {b} habitait au numéro {n}, à {place}.",
            "Comme il pleuvait, {b} attendit {n} minutes devant la gare de {place}.",
            "{a} avait oublié {thing} et dut refaire {n} pas en arrière.",
            "Plus tard, {b} écrivit une lettre de {n} lignes qui décrivait {thing}.",
            "« Donne-moi {thing} », cria {a}, « il reste {n} kilomètres jusqu'à {place} ! »",
        ),
        ("Sylvie", "Marcel", "Camille", "Baptiste", "Claire", "Thierry", "Noémie", "Gaston"),
        ("Dijon", "Quimper", "Nîmes", "Tours", "Cahors", "Vannes", "Vierzon", "Béziers"),
        ("le vélo", "la valise", "la lampe", "le cahier", "la clé", "la montre"),
    ),
    _Language(
        (
            "El día {n} del año, {a} salió hacia {place} con {thing}.",
            "{a} le preguntó a {b} si el tren {n} a {place} ya había salido.",
            "En {place}, {thing} costaba entonces solo {n} pesetas, decía {b}.",
            "Nadie, excepto {a}, sabía que {b} vivía en el número {n} de {place}.",
            "Como llovía, {b} esperó {n} minutos en la estación de {place}.",
            "{a} había olvidado {thing} y tuvo que volver {n} pasos atrás.",
            "Más tarde, {b} escribió una carta de {n} líneas sobre {thing}.",
            "—¡Dame {thing} —gritó {a}—, que faltan {n} kilómetros para {place}!",
        ),
        ("Begoña", "Íñigo", "Lucía", "Ramón", "Pilar", "Sergio", "Inés", "Joaquín"),
        ("Cáceres", "Soria", "Lugo", "Jaén", "Teruel", "Ávila", "Cuenca", "Huelva"),
        ("la bicicleta", "la maleta", "la lámpara", "el libro", "la llave", "el reloj"),
    ),
)

_ITEMS = ("kettle", "lamp", "notebook", "backpack", "headset", "chair", "mug", "cable", "tripod")
_CITIES = ("Oslo", "Lagos", "Lima", "Osaka", "Porto", "Quito", "Riga", "Tunis", "Perth", "Izmir")
_STATES = ("paid", "packed", "shipped", "returned", "waiting")
_SERVICES = ("gateway", "billing", "search", "mailer", "auth", "inventory")
_FAULTS = ("connection reset by peer", "deadline exceeded", "no such key", "disk quota exceeded")
_PEOPLE = ("Amara", "Bo", "Chidi", "Dana", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun")


def language(rng: random.Random) -> Iterator[str]:
    """A story in German, French or Spanish, paragraph by paragraph."""
    chosen = rng.choice(_LANGUAGES)
    cast, places = rng.sample(chosen.names, 3), rng.sample(chosen.places, 3)
    for _ in range(_PARAGRAPHS):
        sentences = []
        for sentence in rng.sample(chosen.sentences, 3):
            one, other = rng.sample(cast, 2)
            gaps = {"a": one, "b": other, "place": rng.choice(places)}
            thing, number = rng.choice(chosen.things), rng.randrange(2, 366)
            sentences.append(sentence.format(**gaps, thing=thing, n=number))
        yield " ".join(sentences)


def json_records(rng: random.Random) -> Iterator[str]:
    """Orders of a few customers, each a JSON object, as a service would answer with."""
    customers = [
        {
            "id": f"C{rng.randrange(10**6):06d}",
            "name": name,
            "postcode": rng.randrange(10**4, 10**5),
            "city": rng.choice(_CITIES),
        }
        for name in rng.sample(_PEOPLE, 4)
    ]
    placed = datetime(2023, 1, 1) + timedelta(minutes=rng.randrange(500_000))
    for _ in range(_PARAGRAPHS):
        placed += timedelta(seconds=rng.randrange(9000))
        bought = {
            item: rng.randrange(99, 90_000) for item in rng.sample(_ITEMS, rng.randrange(1, 4))
        }
        lines = [
            {"cents": cents, "item": item, "sku": f"{rng.randrange(16**8):08x}"}
            for item, cents in bought.items()
        ]
        order = {
            "order": rng.randrange(10**9), "placed": placed.isoformat(),
            "customer": rng.choice(customers), "lines": lines,
            "total": sum(bought.values()), "state": rng.choice(_STATES),
        }  # fmt: skip
        yield json.dumps(order, indent=rng.choice((None, 2)))


def logs(rng: random.Random) -> Iterator[str]:
    """What services write while they answer requests; each paragraph is one request's way."""
    now = datetime(2024, 1, 1) + timedelta(seconds=rng.randrange(30_000_000))
    users = [f"u{rng.randrange(10**5):05d}" for _ in range(5)]
    for _ in range(_PARAGRAPHS):
        request, user = f"{rng.randrange(16**8):08x}", rng.choice(users)
        lines = []
        for service in rng.sample(_SERVICES, 3):
            now += timedelta(milliseconds=rng.randrange(1, 4000))
            stamp = now.isoformat(timespec="milliseconds")
            took, size = rng.randrange(1, 2000), rng.randrange(200, 90_000)
            level, said = "INFO", f"handled in {took} ms, {size} bytes"
            if rng.random() < 0.2:
                level, said = "ERROR", f"{rng.choice(_FAULTS)} after {took} ms, attempt {size % 5}"
            lines.append(f"{stamp} {level:<5} {service}[{size % 997}] {request} user={user} {said}")
        yield "\n".join(lines)


def dialogue(rng: random.Random) -> Iterator[str]:
    """Two people settle who brings what, asking now and then for what was settled before."""
    one, other = rng.sample(_PEOPLE, 2)
    settled: list[tuple[str, int, str]] = []
    for turn in range(_PARAGRAPHS):
        if settled and rng.random() < 0.4:
            item, count, city = rng.choice(settled)
            yield f"{one}: Remind me, how many of the {item}s for {city} did we say?"
            yield f"{other}: We said {count}, the {item}s for {city}. Nothing else has changed."
            continue
        item, city = rng.choice(_ITEMS), rng.choice(_CITIES)
        count, hour = rng.randrange(12, 990), rng.randrange(6, 21)
        settled = [each for each in settled if (each[0], each[2]) != (item, city)]
        settled.append((item, count, city))
        asked = ("Could you take", "What about sending", "I would like to move")[turn % 3]
        yield f"{one}: {asked} {count} {item}s to {city} at {hour} o'clock on day {turn + 1}?"
        yield f"{other}: Fine, {count} {item}s, {city}, {hour}. I noted it as number {turn * 7}."


MAKERS: Mapping[str, Callable[[random.Random], Iterator[str]]] = {
    "json": json_records,
    "logs": logs,
    "dialogue": dialogue,
    "language": language,
}
"""By kind of sample."""
