"""Text -> search terms, as the official index makes them: Lucene's English analysis.

Takes any text, gives stemmed terms: Unicode words (UAX #29) and emoji, lower case, without `'s` and
stop words, Porter stems in the variant of Lucene. It keeps no state.
"""

import re
from functools import lru_cache

import regex
import Stemmer

from step_ray.envs.webshop.tables import STOP_WORDS

_MARKS = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*"
_LETTER = rf"[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}]{_MARKS}"
_DIGIT = rf"\p{{WB=Numeric}}{_MARKS}"
_IN_WORD = r"[\p{WB=MidLetter}\p{WB=MidNumLet}\p{WB=Single_Quote}]"
_IN_NUMBER = r"[\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=Single_Quote}]"
_JOINER = r"\p{WB=ExtendNumLet}"
_PICTOGRAPH = r"[\p{Extended_Pictographic}\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705]"
"""With the stars, hands and signs that were emoji in the Unicode of the official index (12)."""
_EMOJI = rf"{_PICTOGRAPH}[\uFE0F\p{{EMod}}]*"
_WORD = regex.compile(
    rf"{_JOINER}*(?:(?:{_LETTER}(?:{_IN_WORD}?{_LETTER})*|{_DIGIT}(?:{_IN_NUMBER}?{_DIGIT})*"
    rf"|\p{{WB=Katakana}}{_MARKS}){_JOINER}*)+"
    rf"|\p{{Script=Han}}|\p{{Script=Hiragana}}"
    rf"|{_EMOJI}(?:\u200d{_EMOJI})*"
)
_POSSESSIVE = ("'s", "\u2019s", "\uff07s")
_MEASURE_OVER_0 = re.compile(r"[^aeiou]*[aeiouy]+[^aeiou]")
"""A stem with a vowel before a consonant: measure > 0 in Porter's terms."""


def analyse(text: str) -> list[str]:
    """The search terms of a text, in order, with repeats."""
    return [term for word in _WORD.findall(text.lower()) if (term := _term(word))]


@lru_cache(maxsize=100_000)
def _term(word: str) -> str:
    if word.endswith(_POSSESSIVE):
        word = word[:-2]
    return "" if word in STOP_WORDS else _stem(word)


def _stem(word: str) -> str:
    """Porter's stem; Lucene's variant also knows -bli (assembly) and -logi (technology)."""
    if len(word) < 3:
        return word
    stem = str(_stemmer().stemWord(word))
    if stem.endswith("bli") and _MEASURE_OVER_0.match(stem[:-3]):
        return str(_stemmer().stemWord(stem[:-1] + "e"))
    if stem.endswith("logi") and _MEASURE_OVER_0.match(stem[:-4]):
        return stem[:-1]
    return stem


@lru_cache(maxsize=1)
def _stemmer() -> Stemmer.Stemmer:
    return Stemmer.Stemmer("porter")
