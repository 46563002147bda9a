"""English words that no rule splits right: short forms, abbreviations, units, emoticons. spaCy 3.8 has them for special; see words.py."""

UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb MB kb KB gb "
    "GB tb TB T G M K % км м см мм кг г"
)
ABBREVIATIONS = (
    "a.m. p.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. "
    "Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. "
    "Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. "
    "Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. and/or w/o ma'am Ma'am o'clock O'clock lovin' Lovin' "
    "havin' Havin' doin' Doin' goin' Goin' 'em 'll 'nuff 's 'S ‘s ‘S 'd 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ' '' "
    "C++"
)
MOST_SPECIAL = 12  # characters of the longest word that is split as a whole


def short_forms() -> dict[str, list[str]]:
    """English short forms and what they are split into: "didn't" -> did, n't; "cannot" -> can, not."""
    whole: dict[str, list[str]] = {}

    def add(*parts: str) -> None:
        """With its apostrophes, with curly ones, and without."""
        for first in (parts[0], parts[0].title()):
            for mark in "'’":
                spelled = [part.replace("'", mark) for part in (first, *parts[1:])]
                whole["".join(spelled)] = spelled

    def bare(*parts: str) -> None:
        add(*parts)
        add(*[part.replace("'", "") for part in parts])

    bare("i", "'m")
    bare("i", "'m", "a")
    for word in "i you he she it we they".split():
        for tail in (["'ll"], ["'ll", "'ve"], ["'d"], ["'d", "'ve"]):
            bare(word, *tail)
    for word in "i you we they".split():
        bare(word, "'ve")
    for word in "you we they".split():
        bare(word, "'re")
    for word in "he she it".split():
        bare(word, "'s")
    for word in "who what when where why how there that this these those".split():
        for tail in (["'ll"], ["'ll", "'ve"], ["'d"], ["'d", "'ve"]):
            bare(word, *tail)
        if word not in ("these", "those"):
            bare(word, "'s")
        if word not in ("that", "this"):
            bare(word, "'re")
            bare(word, "'ve")
    for word in "ca could do does did had may might must need ought sha should wo would".split():
        bare(word, "n't")
        bare(word, "n't", "'ve")
    for word in "could might must should would".split():
        bare(word, "'ve")
    for word in "ai are is was were have has dare".split():
        bare(word, "n't")
    for parts in (["can", "not"], ["gon", "na"], ["got", "ta"], ["let", "'s"], ["c'm", "on"], ["not", "'ve"], ["how", "'d", "'y"]):
        add(*parts)
    bare("not", "'ve")
    for hour in range(1, 13):
        for period in ("a.m.", "am", "p.m.", "pm"):
            whole[f"{hour}{period}"] = [str(hour), period]
    whole |= {"y'all": ["y'", "all"], "yall": ["y", "all"]}
    for word in "ill its hell shell shed were well whore".split():  # words of their own
        whole.pop(word, None)
        whole.pop(word.title(), None)
    return whole


def emoticons() -> list[str]:
    """Faces, eyes first or last: spaCy takes them for one word, and so also `):` and `8)` where they are none."""
    upright = {":": ") )) ))) ] } ( (( ((( / | P p O o 0 * 3 > X x D", ";": ") D", "8": ") D"}
    faces = [eyes + nose + mouth for eyes, mouths in upright.items() for nose in ("", "-") for mouth in mouths.split()]
    faces += ["=" + mouth for mouth in ")](/|3D["] + [mouth + eyes for mouth in "([" for eyes in (":", "-:", "=")]
    return faces + "(o: (-8 (; (-; ): )-: ]= :o) :1 :() :') :'-) :'( :'-( >:( >:o xD XD xDD XDD <3 <33 </3".split()
