"""Small tables of facts. Splits are disjoint by entity: training teaches how to answer, the base knows the facts."""

from lorary.data.builtin.sampling import SamplingPlan, tabled, words

# Continent: country, capital.
COUNTRIES = {
    "Africa": """Egypt:Cairo Kenya:Nairobi Nigeria:Abuja Ghana:Accra Morocco:Rabat Algeria:Algiers Tunisia:Tunis
        Libya:Tripoli Sudan:Khartoum Senegal:Dakar Mali:Bamako Uganda:Kampala Rwanda:Kigali Zambia:Lusaka Togo:Lome
        Zimbabwe:Harare Angola:Luanda Somalia:Mogadishu Mozambique:Maputo Namibia:Windhoek Botswana:Gaborone
        Madagascar:Antananarivo Liberia:Monrovia Niger:Niamey Cameroon:Yaounde Ethiopia:Addis_Ababa Gabon:Libreville
        Malawi:Lilongwe Sierra_Leone:Freetown Gambia:Banjul Eritrea:Asmara Guinea:Conakry Lesotho:Maseru""",
    "Asia": """Japan:Tokyo China:Beijing Thailand:Bangkok Vietnam:Hanoi Iran:Tehran Iraq:Baghdad Syria:Damascus
        Jordan:Amman Lebanon:Beirut Nepal:Kathmandu Bangladesh:Dhaka Pakistan:Islamabad Afghanistan:Kabul
        Indonesia:Jakarta Philippines:Manila Mongolia:Ulaanbaatar Uzbekistan:Tashkent Cambodia:Phnom_Penh
        Laos:Vientiane Qatar:Doha Oman:Muscat Yemen:Sanaa Bahrain:Manama Bhutan:Thimphu India:New_Delhi
        Malaysia:Kuala_Lumpur Kuwait:Kuwait_City Kazakhstan:Astana Kyrgyzstan:Bishkek Tajikistan:Dushanbe
        Turkmenistan:Ashgabat Singapore:Singapore Maldives:Male""",
    "Europe": """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Greece:Athens Norway:Oslo
        Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Austria:Vienna Hungary:Budapest
        Ireland:Dublin Belgium:Brussels Netherlands:Amsterdam Switzerland:Bern Romania:Bucharest Bulgaria:Sofia
        Serbia:Belgrade Croatia:Zagreb Ukraine:Kyiv Latvia:Riga Estonia:Tallinn Lithuania:Vilnius Iceland:Reykjavik
        Albania:Tirana Slovenia:Ljubljana Slovakia:Bratislava Malta:Valletta Belarus:Minsk Moldova:Chisinau
        Luxembourg:Luxembourg Andorra:Andorra_la_Vella Liechtenstein:Vaduz Montenegro:Podgorica""",
    "America": """Canada:Ottawa Cuba:Havana Jamaica:Kingston Honduras:Tegucigalpa Nicaragua:Managua Belize:Belmopan
        Haiti:Port-au-Prince Peru:Lima Chile:Santiago Brazil:Brasilia Argentina:Buenos_Aires Uruguay:Montevideo
        Paraguay:Asuncion Ecuador:Quito Colombia:Bogota Venezuela:Caracas Guyana:Georgetown Mexico:Mexico_City
        Suriname:Paramaribo Barbados:Bridgetown Bahamas:Nassau Panama:Panama_City Guatemala:Guatemala_City
        Costa_Rica:San_Jose El_Salvador:San_Salvador Dominica:Roseau Grenada:Saint_George's""",
}
# Element, symbol.
SYMBOLS = """hydrogen:H helium:He lithium:Li beryllium:Be boron:B carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne
    sodium:Na magnesium:Mg aluminium:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl argon:Ar potassium:K calcium:Ca
    scandium:Sc titanium:Ti vanadium:V chromium:Cr manganese:Mn iron:Fe cobalt:Co nickel:Ni copper:Cu zinc:Zn
    gallium:Ga germanium:Ge arsenic:As selenium:Se bromine:Br krypton:Kr rubidium:Rb strontium:Sr yttrium:Y
    zirconium:Zr niobium:Nb molybdenum:Mo technetium:Tc ruthenium:Ru rhodium:Rh palladium:Pd silver:Ag cadmium:Cd
    indium:In tin:Sn antimony:Sb tellurium:Te iodine:I xenon:Xe caesium:Cs barium:Ba lanthanum:La cerium:Ce
    tungsten:W rhenium:Re osmium:Os iridium:Ir platinum:Pt gold:Au mercury:Hg thallium:Tl lead:Pb bismuth:Bi
    polonium:Po radon:Rn francium:Fr radium:Ra actinium:Ac thorium:Th uranium:U plutonium:Pu"""
# Class: animals.
ANIMALS = {
    "bird": """sparrow eagle pigeon parrot robin crow swan penguin ostrich falcon hawk goose duck turkey pelican raven
        stork heron flamingo peacock canary seagull woodpecker hummingbird nightingale magpie finch kingfisher quail""",
    "fish": """salmon trout tuna cod herring carp eel pike perch mackerel sardine anchovy haddock halibut sturgeon
        flounder catfish goldfish piranha barracuda swordfish minnow snapper grouper tilapia swordtail""",
    "insect": """ant bee wasp beetle moth butterfly fly mosquito cricket grasshopper dragonfly termite ladybug flea
        cockroach hornet locust mantis aphid firefly bumblebee gnat mayfly earwig cicada weevil""",
    "mammal": """dog cat horse cow pig sheep goat lion tiger bear wolf fox elephant giraffe zebra kangaroo whale dolphin
        bat rabbit squirrel mouse rat deer camel gorilla monkey otter seal hedgehog""",
}
# Kind: foods.
FOODS = {
    "fruit": """apple banana cherry grape orange lemon peach pear plum mango melon strawberry raspberry blueberry
        pineapple apricot kiwi papaya fig date coconut lime grapefruit blackberry cranberry""",
    "vegetable": """carrot potato onion cabbage spinach broccoli lettuce cucumber celery radish turnip garlic leek
        cauliflower asparagus beetroot parsnip kale artichoke aubergine pumpkin zucchini eggplant""",
    "meat": """beef pork lamb chicken turkey bacon ham veal venison mutton sausage steak duck salami meatball
        ribs liver goose brisket prosciutto""",
    "drink": """water tea coffee milk juice beer wine lemonade cocoa cider whisky vodka rum gin cola champagne espresso
        sherry smoothie milkshake brandy tequila""",
}


def _pairs(table: str) -> list[tuple[str, str]]:
    cells = (entry.replace("_", " ").partition(":") for entry in words(table))
    return [(key, value) for key, _, value in cells]


def _classes(members: dict[str, str]) -> list[list[tuple[str, str]]]:
    return [[(member, name) for member in words(text)] for name, text in members.items()]


CAPITALS = [_pairs(table) for table in COUNTRIES.values()]
CONTINENTS = [[(country, name) for country, _ in _pairs(table)] for name, table in COUNTRIES.items()]

PLANS = (
    SamplingPlan("capital_city", "facts", "Capital of:", tabled(*CAPITALS)),
    SamplingPlan("continent", "facts", "Continent of:", tabled(*CONTINENTS), options=tuple(COUNTRIES)),
    SamplingPlan("chemical_symbol", "facts", "Chemical symbol of:", tabled(_pairs(SYMBOLS))),
    SamplingPlan("animal_class", "facts", "Kind of animal:", tabled(*_classes(ANIMALS)), options=tuple(ANIMALS)),
    SamplingPlan("food_kind", "facts", "Kind of food:", tabled(*_classes(FOODS)), options=tuple(FOODS), role="heldout"),
)
