"""A rough guess of the languages of texts: by script, and for the Latin one by frequent words.

It is a heuristic without a model: it knows the languages listed here, tells related ones apart poorly, takes a language that it
does not know for "other", and a mixed text for its most frequent language. Short texts, code and tables are mostly "other".
"""

import re
from collections import Counter
from collections.abc import Iterable

from preference_training.data.quality.words import words

# Of the letters of a text, the script that most belong to decides.
SCRIPTS = {
    "Japanese": "\u3040-\u30ff",
    "Korean": "\uac00-\ud7af\u1100-\u11ff",
    "Chinese": "\u3400-\u4dbf\u4e00-\u9fff",
    "Cyrillic script": "\u0400-\u04ff",
    "Arabic script": "\u0600-\u06ff",
    "Devanagari script": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Hebrew": "\u0590-\u05ff",
    "Greek": "\u0370-\u03ff",
    "Thai": "\u0e00-\u0e7f",
}
LETTERS = {name: re.compile(f"[{letters}]") for name, letters in SCRIPTS.items()}
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
STOP_WORDS = {
    "English": "the of and to in is that it for was with as are be this have from not you what how can which your",
    "German": "der die das und ist nicht ein eine zu den mit von für auf im dem wie sich auch als ich wir sie werden",
    "French": "le la les des et est une dans pour que qui sur pas avec du au ce il sont vous nous comment être",
    "Spanish": "el los las una que por con para del como es más pero sus su al lo este está y qué cómo son",
    "Portuguese": "os uma não que com para do da em como mais dos das ao você são isso seu sua pelo pela é",
    "Italian": "il gli una che di per con non del della sono come più nel anche questo è alla dei delle si cosa",
    "Dutch": "het een van en is dat niet op te zijn voor met aan ook als er maar wat hoe deze wordt bij naar",
    "Polish": "nie się na jest że do jak ale tak dla co czy przez od po który są być może oraz",
    "Swedish": "och att det som en på är av för den inte med till om har jag ett kan vad hur",
    "Turkish": "bir ve bu için ile da de çok olarak daha ne nas\u0131l gibi olan en var değil kadar",
    "Vietnamese": "của và là có không được trong cho một những các với này để người như khi",
    "Indonesian": "yang dan di untuk dengan ini itu dari pada adalah tidak dalam akan atau juga apa bagaimana ke",
}
LANGUAGE_WORDS = {name: frozenset(listed.split()) for name, listed in STOP_WORDS.items()}
# The least share of a text's words that are frequent words of its language, and the least number of them.
LEAST_SHARE, LEAST_WORDS = 0.08, 2
OTHER = "other"


def language(text: str) -> str:
    """The language, or the script, that a text is mostly in."""
    counts = {name: len(letters.findall(text)) for name, letters in LETTERS.items()}
    # Japanese mixes kana with Chinese characters.
    if counts["Japanese"] and counts["Japanese"] * 10 >= counts["Chinese"]:
        counts["Japanese"] += counts.pop("Chinese")
    script = max(counts, key=counts.__getitem__)
    if counts[script] and counts[script] >= len(LATIN.findall(text)):
        return script
    found = words(text)
    hits = {name: sum(word in frequent for word in found) for name, frequent in LANGUAGE_WORDS.items()}
    best = max(hits, key=hits.__getitem__)
    return best if hits[best] >= max(LEAST_WORDS, LEAST_SHARE * len(found)) else OTHER


def languages(texts: Iterable[str]) -> dict[str, int]:
    """How many texts are in each language, the most frequent first."""
    return dict(Counter(map(language, texts)).most_common())
