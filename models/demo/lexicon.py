"""Words, names and small facts that the generator draws from. Data only."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

NAMES = tuple(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor "
    "Wendy Adam Bella Carl Dora Eric Fiona George Helen Ivan Julia Karl Lucy Max Nina Oscar Peter Ruth Simon Tom "
    "Alice Bob Lena Mark Nora Omar Priya Chen Yuki Ali Zoe Hugo Eva Finn Mila Liam Sara Amir Jane John".split()
)

PET_NAMES = tuple("Rex Bella Luna Max Coco Milo Daisy Rocky Ruby Oscar Pepper Biscuit Shadow Ginger Toby Nala".split())

PETS = tuple("dog cat rabbit parrot hamster horse turtle goldfish".split())

CITIES = tuple(
    "Paris London Berlin Rome Madrid Vienna Oslo Lisbon Dublin Athens Prague Warsaw Tokyo Cairo Delhi Lima Boston "
    "Chicago Toronto Sydney Nairobi Zurich Geneva Milan Munich Hamburg Porto Seville Kyoto Mumbai Lagos Austin "
    "Denver Seattle Dallas Moscow Bergen Leeds York Lyon".split()
)

COLORS = tuple("red blue green yellow orange purple pink brown black white grey golden silver".split())

FOODS = tuple("pizza soup rice bread cheese pasta salad apples honey cake noodles pancakes curry grapes".split())

JOBS = tuple("teacher nurse baker farmer pilot doctor painter driver singer writer lawyer gardener cook judge".split())

ITEMS = tuple(
    "apples pears books pens cups chairs lamps hats shoes bags eggs cakes candles plates clocks stamps "
    "boxes coins".split()
)

WORDS = tuple(
    dict.fromkeys(
        "apple banana cherry garden window winter summer spring autumn river mountain forest ocean island desert "
        "valley house table chair door floor kitchen bottle basket hammer ladder mirror pencil paper book letter "
        "stamp picture music guitar piano violin drum song dance paint color light shadow fire water stone metal "
        "wood glass silver gold cat dog horse sheep goat tiger lion bear wolf fox rabbit mouse eagle falcon parrot "
        "penguin dolphin whale shark turtle frog snake spider ant bee butterfly bread butter cheese honey sugar "
        "salt pepper lemon orange grape melon tomato potato carrot onion garlic rice soup pasta pizza cookie cake "
        "coffee tea milk juice morning evening night today week month year minute hour moment number letter word "
        "sentence story poem question answer idea dream hope friend family mother father sister brother child baby "
        "teacher doctor farmer baker sailor pilot king queen knight castle tower bridge street market school "
        "library museum station airport train plane boat ship bicycle car truck engine wheel rocket planet moon "
        "star sun cloud rain snow wind storm thunder rainbow grass flower tree leaf root seed branch berry "
        "strawberry blueberry mushroom shirt jacket pocket button shoe hat scarf glove ring necklace pillow "
        "blanket candle lamp clock key lock box bag rope knife fork spoon plate cup bowl happy sad angry brave "
        "gentle clever quick slow strong weak heavy bright quiet loud early late young old short tall wide narrow "
        "deep simple hidden secret empty full warm cold fresh sweet bitter sour soft hard smooth rough sharp round "
        "square run walk jump swim climb throw catch carry build break open close write read speak listen think "
        "learn forget remember travel arrive leave follow wander whisper shout laugh smile hello world language "
        "model computer python keyboard screen mouse cable battery camera signal network server cookie pumpkin "
        "balloon holiday blossom mississippi committee success balance coconut pepper kitten puppy rabbit jelly "
        "puzzle dazzle zebra giraffe elephant kangaroo".split()
    )
)

SYLLABLES = tuple(
    "ba be bi bo da de di do fa fe fi go ga ha he ho ja jo ka ke ki ko la le li lo lu ma me mi mo na ne ni no pa pe pi "
    "po ra re ri ro sa se si so ta te ti to tu va ve wa we wi ya yo za zo br cl dr fl gr pl st tr sh ch th nd nt rm ll "
    "ss tt pp x qu".split()
)

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("tall", "short"), ("light", "dark"), ("happy", "sad"),
    ("old", "young"), ("rich", "poor"), ("strong", "weak"), ("full", "empty"), ("hard", "soft"), ("high", "low"),
    ("wet", "dry"), ("open", "closed"), ("early", "late"), ("loud", "quiet"), ("near", "far"), ("thick", "thin"),
    ("wide", "narrow"), ("deep", "shallow"), ("sweet", "bitter"), ("rough", "smooth"), ("clean", "dirty"),
    ("good", "bad"), ("right", "wrong"), ("true", "false"), ("first", "last"), ("up", "down"), ("left", "right"),
    ("day", "night"), ("summer", "winter"), ("buy", "sell"), ("push", "pull"), ("win", "lose"), ("start", "stop"),
    ("give", "take"), ("come", "go"), ("laugh", "cry"), ("love", "hate"), ("north", "south"), ("east", "west"),
    ("inside", "outside"), ("front", "back"), ("top", "bottom"), ("heavy", "light"), ("brave", "afraid"),
    ("always", "never"), ("more", "less"), ("many", "few"), ("asleep", "awake"), ("cheap", "expensive"),
    ("easy", "difficult"), ("simple", "complex"), ("safe", "dangerous"), ("sharp", "blunt"), ("tight", "loose"),
    ("ugly", "beautiful"), ("young", "old"), ("alive", "dead"), ("question", "answer"), ("remember", "forget"),
    ("arrive", "leave"), ("friend", "enemy"), ("begin", "end"), ("above", "below"), ("before", "after"),
    ("cold", "hot"), ("small", "big"), ("slow", "fast"), ("short", "tall"), ("dark", "light"), ("sad", "happy"),
    ("poor", "rich"), ("weak", "strong"), ("empty", "full"), ("soft", "hard"), ("low", "high"), ("dry", "wet"),
    ("late", "early"), ("quiet", "loud"), ("far", "near"), ("thin", "thick"), ("narrow", "wide"), ("bad", "good"),
    ("wrong", "right"), ("false", "true"), ("down", "up"), ("night", "day"), ("winter", "summer"), ("lose", "win"),
)  # fmt: skip

CAPITALS = (
    ("France", "Paris"), ("England", "London"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"),
    ("Austria", "Vienna"), ("Norway", "Oslo"), ("Portugal", "Lisbon"), ("Ireland", "Dublin"), ("Greece", "Athens"),
    ("Poland", "Warsaw"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Peru", "Lima"), ("Kenya", "Nairobi"),
    ("Russia", "Moscow"), ("China", "Beijing"), ("Canada", "Ottawa"), ("Sweden", "Stockholm"), ("Cuba", "Havana"),
    ("Finland", "Helsinki"), ("Denmark", "Copenhagen"), ("Hungary", "Budapest"), ("Turkey", "Ankara"),
    ("Belgium", "Brussels"), ("Iceland", "Reykjavik"), ("Chile", "Santiago"), ("Iraq", "Baghdad"),
)  # fmt: skip

FACTS = (
    (("How many days are in a week?", "How many days does a week have?"), "A week has 7 days."),
    (("How many months are in a year?", "How many months does a year have?"), "A year has 12 months."),
    (("How many hours are in a day?", "How many hours does a day have?"), "A day has 24 hours."),
    (("How many minutes are in an hour?", "How many minutes does an hour have?"), "An hour has 60 minutes."),
    (("How many seconds are in a minute?", "How many seconds does a minute have?"), "A minute has 60 seconds."),
    (("How many legs does a spider have?", "How many legs are on a spider?"), "A spider has 8 legs."),
    (("How many legs does an insect have?", "How many legs are on an insect?"), "An insect has 6 legs."),
    (("How many legs does a dog have?", "How many legs are on a dog?"), "A dog has 4 legs."),
    (("How many legs does a bird have?", "How many legs are on a bird?"), "A bird has 2 legs."),
    (("How many sides does a triangle have?", "How many sides are on a triangle?"), "A triangle has 3 sides."),
    (("How many sides does a square have?", "How many sides are on a square?"), "A square has 4 sides."),
    (("How many sides does a hexagon have?", "How many sides are on a hexagon?"), "A hexagon has 6 sides."),
    (("How many wheels does a bicycle have?", "How many wheels are on a bicycle?"), "A bicycle has 2 wheels."),
    (("How many wheels does a car have?", "How many wheels are on a car?"), "A car has 4 wheels."),
    (("How many letters are in the English alphabet?", "How many letters does English use?"),
        "English has 26 letters."),
    (("How many planets are in the solar system?", "How many planets go round the sun?"), "The sun has 8 planets."),
    (("How many continents are there?", "How many continents does the Earth have?"), "There are 7 continents."),
    (("What color is the sky?", "Which color does the sky have?"), "The sky is blue."),
    (("What color is grass?", "Which color does grass have?"), "Grass is green."),
    (("What color is snow?", "Which color does snow have?"), "Snow is white."),
    (("What color is a lemon?", "Which color does a lemon have?"), "A lemon is yellow."),
    (("What color is coal?", "Which color does coal have?"), "Coal is black."),
    (("What color is blood?", "Which color does blood have?"), "Blood is red."),
    (("What color is a carrot?", "Which color does a carrot have?"), "A carrot is orange."),
    (("What is frozen water called?", "What do we call frozen water?"), "Frozen water is called ice."),
    (("What is a baby dog called?", "What do we call a baby dog?"), "A baby dog is called a puppy."),
    (("What is a baby cat called?", "What do we call a baby cat?"), "A baby cat is called a kitten."),
    (("What is a baby cow called?", "What do we call a baby cow?"), "A baby cow is called a calf."),
    (("What is a baby sheep called?", "What do we call a baby sheep?"), "A baby sheep is called a lamb."),
    (("What is a baby horse called?", "What do we call a baby horse?"), "A baby horse is called a foal."),
    (("What do bees make?", "What is it that bees make?"), "Bees make honey."),
    (("What do cows drink?", "What is it that cows drink?"), "Cows drink water."),
    (("What do pandas eat?", "What is it that pandas eat?"), "Pandas eat bamboo."),
    (("What do rabbits eat?", "What is it that rabbits eat?"), "Rabbits eat grass."),
    (("What does a cow say?", "What sound does a cow make?"), "A cow says moo."),
    (("What does a cat say?", "What sound does a cat make?"), "A cat says meow."),
    (("What does a dog say?", "What sound does a dog make?"), "A dog says woof."),
    (("What does a duck say?", "What sound does a duck make?"), "A duck says quack."),
    (("Which planet do we live on?", "What is the name of our planet?"), "We live on the Earth."),
    (("Which star is nearest to us?", "What is the star nearest to us?"), "The nearest star is the sun."),
    (("Which animal is the largest?", "What is the largest animal?"), "The largest animal is the blue whale."),
    (("Which land animal is the fastest?", "What is the fastest land animal?"),
        "The fastest land animal is the cheetah."),
    (("Which ocean is the largest?", "What is the largest ocean?"), "The largest ocean is the Pacific."),
    (("Which mountain is the highest?", "What is the highest mountain?"), "The highest mountain is Mount Everest."),
    (("Which season comes after winter?", "What season follows winter?"), "Spring comes after winter."),
    (("Which season comes after spring?", "What season follows spring?"), "Summer comes after spring."),
    (("Which season comes after summer?", "What season follows summer?"), "Autumn comes after summer."),
    (("Which season comes after autumn?", "What season follows autumn?"), "Winter comes after autumn."),
    (("At what temperature does water boil?", "When does water boil?"), "Water boils at 100 degrees Celsius."),
    (("At what temperature does water freeze?", "When does water freeze?"), "Water freezes at 0 degrees Celsius."),
)  # fmt: skip
