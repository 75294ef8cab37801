"""Small stories: the part of the training corpus that teaches plain, connected English.

A story is drawn from a plot. A plot is a sequence of positions, and each position has several
alternative sentences; one sentence from each position makes a story. The sentences have slots:
the child's name and pronouns, a friend, a color, and the plot's own (which animal, which place).
The plots follow three rules, so that any mixture reads well:

- Every sentence of a position leaves the story in the same state as the others.
- Pronouns refer only to the child; friends have names, grown-ups kinship terms, animals are "it".
- Whatever a plot's subjects mention appears in each of its stories, because a request may ask
  for it. The first subject does not mention the child: it can follow "NAME and".

Run as a program, it prints three stories for the seed on the command line.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

MIN_WORDS = 60
MAX_WORDS = 160

# Requests for the evaluation: phrasings that no template below can produce.
HELD_OUT: tuple[str, ...] = (
    "Make up a little tale for me where Nora meets a shy fox.",
    "Got any good stories with a snowman?",
    "My daughter wants to hear what happened to Oscar.",
    "Entertain me with a tale of a storm.",
    "What happened when Clara baked a cake? Make it up.",
)


@dataclass(frozen=True, slots=True)
class Story:
    """A story, its title, and a user's request for it."""

    request: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class _Plot:
    subjects: tuple[str, ...]
    positions: tuple[tuple[str, ...], ...]
    slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_GIRLS = (
    "Ada", "Anna", "Bella", "Clara", "Daisy", "Ella", "Emma", "Flora", "Grace", "Hanna",
    "Ida", "Iris", "Jane", "Kate", "Lily", "Lucy", "Maya", "Nora", "Olive", "Rosa", "Ruby", "Tess",
)  # fmt: skip
_BOYS = (
    "Adam", "Arlo", "Ben", "Carl", "Dan", "Eli", "Felix", "Finn", "George", "Hugo",
    "Ivan", "Jack", "Leo", "Max", "Milo", "Noah", "Oscar", "Otto", "Paul", "Sam", "Theo", "Tom",
)  # fmt: skip

_SHE = {"he": "she", "him": "her", "his": "her", "himself": "herself", "child": "girl"}
_HE = {"he": "he", "him": "him", "his": "his", "himself": "himself", "child": "boy"}

_COMMON_SLOTS: Mapping[str, tuple[str, ...]] = {
    "adult": ("mother", "father", "grandmother", "grandfather", "aunt", "uncle"),
    "colour": ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white"),
    "day": ("One morning", "One afternoon", "One day", "On Saturday", "On Sunday", "One fine day"),
}

_ABOUT_NAME = (
    "Tell me a story about {name}.",
    "Tell me a short story about a {child} named {name}.",
    "Write a story about {name}, please.",
    "Can you tell me a story about {name}?",
    "I would like a story about a {child} called {name}.",
    "Please tell a bedtime story about {name}.",
    "Write a few lines about a {child} named {name}.",
    "Who is {name}? Tell me a story.",
)
_ABOUT_SUBJECT = (
    "Tell me a story about {subject}.",
    "Tell me a short story about {subject}.",
    "I would like a bedtime story about {subject}.",
    "Write a short story about {subject}.",
    "Do you know a story about {subject}?",
    "Could you write a small story about {subject}?",
    "A story about {subject}, please.",
    "Please write a story for children about {subject}.",
    "Write a story with {subject} in it.",
    "Let me hear a story about {subject}.",
    "Make up a story about {subject}.",
)
_ABOUT_BOTH = (
    "Write a small story with {name} and {subject} in it.",
    "Story please: {name} and {the_subject}.",
    "Tell me the story of {name} and {the_subject}.",
    "Tell me a story about {name} and {subject}.",
    "I want a bedtime story with {name} and {subject}.",
    "Can I have a story about {name} and {subject}?",
    "Make up a short story about {name} and {subject}.",
    "Please write a little story for me: {name} and {the_subject}.",
    "Write a story about a {child} named {name} and {subject}.",
)
_REQUESTS = _ABOUT_NAME + _ABOUT_SUBJECT + _ABOUT_BOTH

_SMALL_WORDS = frozenset({"a", "an", "and", "at", "by", "for", "in", "of", "on", "the", "to", "with"})


def _plot(subjects: tuple[str, ...], text: str, **slots: tuple[str, ...]) -> _Plot:
    """A plot from its text: positions are separated by blank lines, their sentences by line ends."""
    positions = tuple(tuple(block.splitlines()) for block in text.strip().split("\n\n"))
    return _Plot(subjects, positions, slots)


_PLOTS: tuple[_Plot, ...] = (
    _plot(
        ("a lost {thing}", "a lost {thing} and a good friend"),
        """
{name} had {a_colour} {thing} and took it everywhere.
{name} was a little {child} who loved {his} {colour} {thing}.
Once there was a {child} named {name} who had {a_colour} {thing}.
Nothing made {name} as happy as {his} {colour} {thing}.

{day}, {he} played a long game in the {place}, and when it was over, the {thing} was lost.
{day}, {he} ran about in the {place} until {he} saw that the {thing} was lost.
{day}, {he} went to play in the {place}, and soon the {thing} was lost.
{day}, {he} sat down to rest in the {place} and found that the {thing} was lost.

A tear rolled down {his} cheek.
{name} felt so sad that {he} began to cry.
Poor {name} did not know what to do.
How sad {he} was!

Just then {his} good friend {friend} came by and asked, "What is wrong?"
"Why are you so sad?" asked {his} good friend {friend}, who was walking by.
Soon {his} good friend {friend} came along and sat down beside {him}.
Luckily, {his} good friend {friend} was there and came running to help.

"My {thing} is gone," said {name}. "I cannot see it anywhere."
"I had my {thing} this morning, and now it is gone," said {name}.
"I have looked and looked for my {thing}," said {name} in a small voice.
"Will you help me find my {thing}?" asked {name}.

"Let us walk back the way you came," said {friend}.
{friend} said, "Two pairs of eyes are better than one."
"Do not worry," said {friend}. "We will look together."
{friend} smiled and said, "We will not stop until we find it."

They looked near the gate and along the path, but it was not there.
First they looked by the path, and then they looked by the gate.
Together they searched slowly, one step at a time.
They looked high and low, and they did not give up.

Then {name} saw something {colour} {spot}.
At last something {colour} caught their eyes {spot}.
All of a sudden, {friend} pointed to something {colour} {spot}.
There, {spot}, was something {colour}.

It was the {thing}! {name} laughed and held it close.
"There it is!" cried {name}, and {he} picked up the {thing} and hugged it.
It was the {thing}, safe and sound, and {name} jumped for joy.
"My {thing}!" shouted {name}, and {he} danced in a circle.

"Thank you," said {name}. "You are a good friend."
From then on, {name} took good care of the {thing} and never lost it again.
The two friends played together until it was time to go home.
They walked home hand in hand, and {name} smiled all the way.
""",
        thing=("kite", "ball", "hat", "toy boat", "toy horse", "toy bear", "drum", "umbrella"),
        place=("park", "meadow", "orchard"),
        spot=("under a bush", "behind a tall tree", "beside a stone wall", "in the long grass", "under an old bench"),
    ),
    _plot(
        ("a new friend", "a {child} who made a new friend"),
        """
{name} was a {child} who had just moved to {a_place}.
Once there was a {child} named {name} whose family moved to {a_place}.
A {child} named {name} came to live in {a_place}.
When {name} was six, {he} went to live in {a_place}.

The house was nice, but {he} did not know anyone there.
Everything was new, and nobody knew {his} name.
At first {he} had no one to play with.
It was pretty there, but {he} missed the children {he} used to play with.

"I wish I had a new friend," {he} said to {his} {adult}.
"How do I make a new friend?" {he} asked {his} {adult}.
Every night {he} told {his} {adult} that {he} wanted a new friend.
"Do you think I will find a new friend?" {he} asked {his} {adult}.

"Just smile and say hello," said {his} {adult}. "That is how it starts."
{His} {adult} said, "Be kind, be brave, and say hello."
"A friend can start with one small hello," said {his} {adult}.
{His} {adult} thought for a moment and said, "Somebody out there would love to hear you say hello."

{day}, {name} took {his} {colour} {toy} outside and saw a child sitting alone.
{day}, a child was sitting all alone by the gate when {name} came out with {his} {colour} {toy}.
{day}, {name} carried {his} {colour} {toy} outside and found another child there, all alone.
{day}, {name} looked out and saw a child alone on the steps, so {he} took {his} {colour} {toy} and went outside.

{His} heart beat fast, but {he} smiled and said, "Hello."
It was hard to be brave, but {name} waved and said, "Hello."
{name} took a deep breath, walked over, and said, "Hello."
For a moment {name} felt shy, and then {he} said in a clear voice, "Hello."

"Hello," said the child. "I am {friend}. I like your {toy}."
The child looked up and said, "My name is {friend}. What a fine {toy}!"
"My name is {friend}," said the child. "May I see your {toy}?"
The child's face lit up. "I am {friend}," came the answer. "I have always wanted {a_toy}."

"Would you like to play?" asked {name}, and {friend} jumped up at once.
So {name} held out the {toy}, and soon they were both laughing.
They took turns with the {toy} and talked about everything.
Before long they were playing with the {toy} as if they had always known each other.

That night {name} told {his} {adult}, "All it took was one hello."
After that day, {name} and {friend} met at the gate every morning.
When it was time to go in, {friend} said, "Come back tomorrow!" and {name} promised to come.
{name} went to bed happy that night, for {he} had a friend at last.
""",
        place=("small town", "quiet village", "house on a hill", "new street", "old farmhouse"),
        toy=("ball", "kite", "jump rope", "scooter", "toy train", "hoop"),
    ),
    _plot(
        ("a storm", "a storm and a little {animal}"),
        """
{name} lived in a small house {where} with a little {animal}.
In a small house {where} lived a {child} named {name} and a little {animal}.
{name} was a {child} who lived {where} with {his} family and a little {animal}.
A {child} named {name} and a little {animal} lived together in a cosy house {where}.

One evening, dark clouds filled the sky, and a storm began.
One night, the wind began to howl, for a storm was coming.
As the sun went down one evening, a storm rolled in over the hills.
One night, a great storm came and shook the windows.

Rain beat on the roof, and thunder rumbled far away.
Lightning flashed, and the rain came down in sheets.
Boom! went the thunder, and the rain ran down the glass.
The trees bent in the wind, and the thunder growled.

The {animal} hid under the bed and would not come out.
When {name} looked down, the {animal} was hiding under the bed.
In a flash, the {animal} ran under the bed.
Poor little {animal}! It crept under the bed and shook all over.

{name} was afraid too, but {he} wanted to help.
It was scary for {name} as well, but {he} knew that the {animal} needed {him}.
{name} felt a little scared, but {he} did not run away.
"I do not like the noise either," said {name}, "but we have each other."

So {he} lit a small lamp and sat down on the floor.
With {a_colour} blanket around {his} shoulders, {he} lay down on the floor.
Quietly, {he} brought {a_colour} blanket and knelt beside the bed.
So {he} got down on {his} hands and knees and looked under the bed.

"It is only noise," {he} said in a soft voice. "It cannot hurt us in here."
"Come to me, little one," {he} whispered. "We are safe and dry in here."
Then {he} began to sing a song that {his} {adult} had taught {him}.
In a gentle voice, {he} told a long story about a warm and sunny day.

Slowly, the {animal} came out and curled up in {his} lap.
After a while, a small nose came out, and the {animal} climbed into {his} lap.
Little by little, the {animal} crept closer, until it was safe in {his} arms.
The {animal} listened, and at last it came out and lay down beside {him}.

Together they listened until the rain grew quiet, and both of them fell asleep.
The thunder moved far away, and the two of them slept until morning.
By the time the storm was over, they were both fast asleep.
Soon the wind grew tired, and so did they.

In the morning the sun was shining, and the whole world looked clean and new.
When they woke up, there was a rainbow over the hills.
The next day was bright and clear, and {name} was proud of having been so brave.
After that night, neither of them was so afraid of thunder.
""",
        animal=("puppy", "kitten", "dog", "cat", "rabbit"),
        where=("on a hill", "by the sea", "near the woods", "at the edge of the village"),
    ),
    _plot(
        ("an old bridge", "an old bridge and {a_animal}"),
        """
Near {name}'s house, an old bridge crossed a {water}.
{name} lived close to a {water} with an old bridge across it.
There was an old bridge over the {water}, and a {child} named {name} walked by it every day.
Every day a {child} named {name} crossed the old bridge over the {water}.

It was made of wood, and it creaked at every step.
The boards were grey, and some of them were loose.
It was as old as the hills, and moss grew on its sides.
People said that it had been there for a hundred years.

{day}, {name} set off for the bridge with {food} for {his} {adult}.
{day}, {name} was taking {food} to {his} {adult}, who lived on the other side.
{day}, {his} {adult} was waiting on the other side, and {name} was bringing {food}.
{day}, {name} set out with {food} to visit {his} {adult} on the other side.

But one of the boards had broken, and there was a hole in the middle.
When {he} came near, {he} saw that a board in the middle was gone.
There was a hole in the middle of the bridge, and the water rushed below.
In the middle of the bridge a board was missing, and {he} stopped just in time.

On the far side sat {a_animal} that could not get across.
{A_animal} sat on the far side and looked sadly at the hole.
Then {he} saw {a_animal} on the far side, too scared to cross.
Over on the far side, {a_animal} was waiting and did not dare to jump.

"We both need to cross," said {name}. "I will think of something."
"Do not be afraid," {name} called. "I have an idea."
{name} put down {his} {colour} basket and looked around.
"There must be a way," said {name}, and {he} began to think.

In the grass {he} found a strong plank that was just the right length.
By the path lay a long, flat plank.
Behind a bush {he} found a good, thick plank.
Close by, next to a pile of logs, lay a plank as wide as the hole.

Carefully, {he} pushed it over the hole and tested it with one foot.
With all {his} strength, {he} dragged it onto the bridge and laid it over the hole.
It was heavy, but {he} pulled and pushed until it covered the hole.
Bit by bit, {he} moved it into place, and it fitted well.

The {animal} walked across, step by step, and rubbed against {his} leg.
At once the {animal} came over and looked up at {him} as if to say thank you.
"Now come," {he} said, and the {animal} trotted across to {him}.
One paw at a time, the {animal} crossed, and {name} clapped {his} hands.

Then {name} crossed too, and {his} {adult} gave {him} a big hug.
After that {name} hurried across to {his} {adult}, and together they enjoyed the {food}.
Then {name} went on {his} way, and {his} {adult} was very proud of {him}.
When {his} {adult} heard about it, {name} got an extra kiss on the cheek.
""",
        adult=("grandmother", "grandfather", "aunt", "uncle"),
        water=("stream", "river", "brook"),
        animal=("fox", "cat", "small dog", "rabbit", "squirrel", "otter"),
        food=("warm bread", "apple pie", "fresh cheese", "honey cakes", "sweet plums"),
    ),
    _plot(
        ("a garden", "a garden and a tiny seed"),
        """
More than anything, {name} wanted to have a garden.
Once there was a {child} named {name} who dreamed of having a garden.
Behind {name}'s house there was a garden with nothing in it.
{name} was a {child} who had a very small garden.

{day}, {his} {adult} gave {him} a tiny seed.
{day}, {he} found a tiny seed in {his} pocket.
{day}, {he} bought a tiny seed at the market for one penny.
{day}, {he} opened a box and found a tiny seed inside.

"What will it be?" {he} asked. {His} {adult} only smiled and said, "Wait and see."
"It is so small," {he} said. "Small things can grow," said {his} {adult}.
{His} {adult} said, "Give it water, sun, and time."
"Can this become something big?" {he} asked, and {his} {adult} said, "If you take good care of it."

So {he} dug a little hole, put the seed in, and covered it with soil.
With {his} own hands, {he} made a hole and laid the seed in the dark soil.
Gently, {he} pressed the seed into the ground beside the {colour} fence.
So {he} found a sunny spot, planted the seed, and patted down the soil.

Every day {he} brought water in {his} {colour} can, but nothing happened.
Each morning {he} gave it water, and each morning the ground looked just the same.
Day after day {he} brought water, but there was nothing to see.
A week went by, and {he} watered it well, but no plant came up.

"Perhaps it is asleep," said {his} friend {friend}.
{His} friend {friend} came to look and said, "I do not think it will grow."
"Maybe the birds ate it," said {his} friend {friend}.
"You should plant something else," said {his} friend {friend}.

But {name} did not give up.
"I will wait a little longer," said {name}.
Still, {name} kept on watering and singing to the ground.
"Good things take time," said {name}, and {he} filled the can again.

Then one day a tiny green leaf came out of the soil.
At last, after a night of soft rain, a green leaf peeped out.
One bright morning, there it was: one small green leaf!
Then, when {he} had almost lost hope, a green leaf came up.

It grew and grew until it was {a_plant}.
The plant grew taller each day, and by the end of summer it was {a_plant}.
All summer long it grew, and it turned into {a_plant}.
Week by week it grew, and everyone could see that it was {a_plant}.

{name} and {friend} sat down beside it and smiled.
"You were right to wait," said {friend}, and {name} was very proud.
Everyone in the street came to see it, and {name} told them all to be patient.
{name} saved some new seeds and gave half of them to {friend}.
""",
        plant=("tall sunflower", "giant pumpkin plant", "fine rose bush", "big bean plant", "lovely sweet pea"),
    ),
    _plot(
        ("{a_cake}", "{a_cake} that went wrong"),
        """
The birthday of {name}'s {adult} was near, and {name} wanted to bake {a_cake}.
{name} was a {child} who wanted to bake {a_cake} for {his} {adult}.
{day}, {name} said, "I will bake {a_cake} for my {adult}."
It was a special day for {name}'s {adult}, and {name} wanted to bake {a_cake}.

{His} friend {friend} came over to help.
"May I help?" asked {his} friend {friend}, and {name} said yes.
{friend}, who lived next door, came to help {him}.
To make it more fun, {he} asked {friend} to help.

They put on {colour} aprons and washed their hands.
First they washed their hands and found a big {colour} bowl.
On the table they set out {a_colour} bowl, a spoon, and a tin.
Each of them took a spoon, and they set a big {colour} bowl on the table.

In went the flour, the eggs, the butter, and the milk.
They mixed flour and butter, and then they added eggs and milk.
{friend} broke the eggs, and {name} stirred in the flour and the butter.
They stirred and stirred until everything was smooth.

Soon it was in the oven, and a warm smell filled the kitchen.
Into the oven it went, and they sat down to wait.
A neighbour helped them put it in the oven, and they watched it rise.
Then it went into the oven, and they could hardly wait.

But when they tasted a crumb, something was wrong. They had used salt, not sugar!
When it was done, {name} took a bite. "Something is wrong," {he} said. "We used salt and not sugar!"
It looked fine, but something was wrong. "Oh no," said {friend}, tasting it. "That was salt!"
When it was done, it tasted all wrong. The jar on the table was not sugar but salt!

For a moment nobody said a word.
{name} felt like crying.
"Now it is ruined," said {name} with a sigh.
They looked at each other with wide eyes.

Then {friend} began to giggle, and {name} had to laugh too.
"We can try again," said {friend}. "We still have time."
But {friend} said, "Everyone makes mistakes. Let us start again."
"It is only a mistake," said {friend}. "Next time we will taste the sugar first."

So they began again, and this time they were very careful.
The second time, they checked every jar before they used it.
Once more they mixed and stirred, this time with real sugar.
So they washed the bowl and made another one, with plenty of sugar.

It came out golden and sweet, and {his} {adult} ate two big pieces.
"This is the best cake I have ever had," said {his} {adult}.
When {his} {adult} tasted the new cake, there were smiles all around.
That evening they all ate it together and laughed about the salt.
""",
        cake=("honey cake", "apple cake", "lemon cake", "carrot cake", "plum cake", "orange cake", "cherry cake"),
    ),
    _plot(
        ("a race", "a race and a kind {child}"),
        """
Every summer there was a race {where}.
It was the day of the big race {where}.
The children were getting ready for a race {where}.
There was going to be a race {where}, and everyone was talking about it.

{name} was a kind {child} who had practised for weeks.
A kind {child} named {name} wanted to win more than anything.
One of the runners was {name}, a kind {child} with {colour} shoes.
{name}, a kind {child} with quick feet, hoped to come in first.

The prize was {a_prize}.
For the winner there was {a_prize}.
On a table stood the prize, which was {a_prize}.
Whoever won would get {a_prize}.

"Ready, steady, go!" called the teacher, and off they went.
A whistle blew, and all the children began to run.
Someone waved a flag, and the race began.
"On your marks!" called the teacher, and then they were off.

{name} ran like the wind, and only {friend} could keep up.
Faster and faster ran {name}, until only {friend} was near.
Very soon {name} was in the lead, with {friend} close behind.
With long steps, {name} passed one runner after another, and so did {friend}.

Then there was a cry. {friend} had tripped on a stone and fallen.
Just before the end, {friend} fell down with a cry.
But then {he} heard a thump behind {him}. {friend} had fallen!
All at once {friend} slipped and fell on the path.

{name} looked at the finish line, and then {he} looked back.
The finish line was so close! But {name} stopped.
For only a moment {name} thought about the prize.
It would have been easy to run on, but {name} slowed down.

Then {he} turned around and ran back to help.
"A friend is better than a prize," {he} thought, and {he} went back.
At once {he} hurried back and knelt down. "Are you hurt?" {he} asked.
Quickly {he} went back and held out a hand.

"My knee hurts," said {friend}. "You should go on without me."
"Why did you stop?" asked {friend}. "You were going to win!"
"Go on, or you will lose," said {friend}.
{friend} looked up in surprise and said, "But you will not win now."

"We will finish together," said {name}, and arm in arm they crossed the line.
{name} only smiled, and side by side they walked to the finish.
"Winning is not everything," said {name}, and they crossed the line together.
"Lean on me," said {name}, and they walked over the line at the same time.

They came in last, but everyone cheered for them the loudest.
The winner was so moved that {name} and {friend} were asked to share the prize.
They did not win, but they went home as the best of friends.
"That was the finest race I ever saw," said the teacher, and all the people clapped.
""",
        where=("in the village", "in the park", "at the school", "around the lake", "across the meadow"),
        prize=("silver cup", "golden medal", "big basket of fruit", "bright blue ribbon", "enormous cake"),
    ),
    _plot(
        ("a broken {thing}", "a broken {thing} and the truth"),
        """
In {name}'s house there was {a_thing} that belonged to {his} {adult}.
On a shelf in the living room stood {a_thing}, and {name}'s {adult} had told {him} to be careful with it.
{name} was a {child} whose {adult} had a very old {thing}.
{name}'s {adult} had {a_thing} that was very old and pretty.

It was {colour}, with small flowers painted on it.
Everyone who came to visit said how lovely it was.
It had been a gift from a friend, many years ago.
It was {colour}, and it shone in the light.

{day}, {name} was playing with a ball inside the house.
{day}, {name} was running around the room and pretending to be a horse.
{day}, {name} was dancing in the living room.
{day}, {name} was jumping from chair to chair like a frog.

Crash! The {thing} fell to the floor, and now it was broken.
{His} elbow hit the {thing}, and it fell down. It was broken!
Bump! {He} knocked against a shelf, and soon there was a broken {thing} on the floor.
Then came a loud crash, and there lay the {thing}, broken in two.

{name} stood very still, and {his} face turned red.
At first {name} wanted to hide.
"Oh no," whispered {name}.
A cold feeling came into {his} tummy.

"I could say that the cat did it," {he} thought, but that was not the truth.
Perhaps nobody would ever know, but {he} did not want to hide the truth.
"Should I tell the truth?" {he} wondered, and {he} knew that the answer was yes.
It was hard to tell the truth, but {he} knew that it was right.

So {he} went to {his} {adult} and said, "I broke your {thing}. I am very sorry."
Slowly {he} walked to the kitchen and told {his} {adult} everything.
With tears in {his} eyes, {he} told {his} {adult} what had happened.
So {he} took a deep breath, found {his} {adult}, and said, "It was me. I broke the {thing}."

{His} {adult} was quiet for a moment and then gave {him} a hug.
"Thank you for telling me," said {his} {adult}. "That was brave."
"I am sad about it," said {his} {adult}, "but I am glad that you told me."
{His} {adult} knelt down and said, "Things can break, but I can always trust you."

Together they picked up the pieces and mended the {thing} with glue.
They sat down at the table and glued the pieces together.
With glue and patience, they put it back together.
All evening they worked with glue, until it was whole again.

After that it had a thin line down one side, and they both liked it even more.
From that day on, {name} only played wild games outside.
It was not perfect, but it stood in its place again, and {name} felt light and happy.
"It is better than new," said {his} {adult}, "because we mended it together."
""",
        thing=("lamp", "vase", "teapot", "clock", "bowl", "jug"),
    ),
    _plot(
        ("a shy {animal}", "a {child} and a shy {animal}"),
        """
A shy {animal} lived {where}, close to {name}'s house.
Not far from {name}'s house, {where}, lived a shy {animal}.
Once there was a {child} named {name}, and near {his} house, {where}, lived a shy {animal}.
Everyone in the village knew that a shy {animal} lived {where}, but only a {child} named {name} wanted to meet it.

Whenever anyone came near, it ran away.
At every small sound, it ran off and hid.
Nobody had ever come close to it.
If someone even sneezed, it was gone in a flash.

"I would like to be its friend," said {name}.
{name} wanted so much to be its friend.
"Maybe it is lonely," {name} said to {his} {adult}.
{name} often thought about it and hoped that they could be friends.

{day}, {he} ran up to it and shouted, "Hello!" Of course it ran away.
{day}, {he} tried to catch it in {his} arms, but it was far too quick.
{day}, {he} ran after it, but it hid until {he} went home.
{day}, {he} jumped out to say hello, and it fled in fear.

"You must be quiet and patient," said {his} {adult}.
{His} {adult} said, "Let it come to you."
"Think how big you must look," said {his} {adult}. "Sit still and wait."
"A shy friend needs time," {his} {adult} told {him}.

The next day {he} took {food}, put it on the ground, and sat down far away.
So the next day {he} brought {food} and waited without a sound.
The day after that, {he} laid {food} on a flat stone and sat very still.
So {he} came back with {food}, sat in the grass, and did not move.

At first nothing happened, and then two bright eyes looked out.
For a long time it was quiet, and then a small nose peeped out.
An hour went by before the leaves began to move.
After a long wait, {he} heard soft little steps.

The {animal} took one bite, looked at {him}, and took another.
Step by step, the {animal} came out and began to eat.
Slowly, slowly, the {animal} came closer and ate every bit.
Out came the {animal}, sniffing the air, and it began to eat.

{name} came back every day and sat a little closer each time.
Every day after that, {name} brought something good to eat and moved a little nearer.
Day after day {name} returned, and day after day it was less afraid.
All that week {name} came at the same time and spoke in a soft voice.

In the end, it ate from {his} hand, and {name} had never been so happy.
Then one evening it came and sat right beside {him}, and from then on they were friends.
At last it let {him} stroke its back. Being patient had worked.
And one day it was waiting for {him} by the path, for now they were friends.
""",
        animal=("fox", "deer", "rabbit", "squirrel", "hedgehog", "badger"),
        where=("at the edge of the woods", "behind the old barn", "under the tall pine trees", "near the mill"),
        food=("an apple", "a carrot", "a handful of berries", "a ripe pear", "a piece of bread"),
    ),
    _plot(
        ("{a_animal} that knew the way home", "a {child} who was lost in the {place}"),
        """
{name} was a {child} who loved to walk in the {place}.
Once a {child} named {name} went for a walk in the {place}.
{day}, a {child} named {name} went into the {place} to pick flowers.
{day}, a {child} named {name} set out to explore the {place}.

{He} followed {a_colour} butterfly and did not look where {he} was going.
{A_colour} butterfly flew by, and {he} ran after it, farther and farther.
Because {he} was looking for berries, {he} forgot to watch the path.
There was so much to see that {he} did not notice how far {he} had gone.

When {he} looked up, {name} knew that {he} was lost.
Soon nothing looked the same, and {name} was lost.
Then {he} stopped and turned around. {name} was lost!
By and by the path came to an end, and {name} was lost.

The sun was going down, and the shadows were long.
It was getting late, and the air was growing cold.
Evening was coming, and everything was very still.
Above {him}, the sky was slowly turning dark.

"How will I find the way home?" {he} said out loud.
"I do not know the way home," {he} whispered.
"Can anyone show me the way home?" {he} called.
"If only I knew the way home," {he} sighed.

Just then, {a_animal} came out from behind a rock.
"I can help you," said a small voice. It was {a_animal}.
Something moved in the grass, and out came {a_animal}.
All at once {he} saw {a_animal} that was looking at {him} with kind eyes.

"I know every path here," said the {animal}. "Come with me."
"Do not cry," said the {animal}. "Your house is not far away."
"Follow me, and stay close," said the {animal}.
"I have seen the house with the {colour} door," said the {animal}. "Is that the one?"

They went past a hollow log and over a little stream.
Together they walked down a hill and around a quiet pond.
On they went, over stones and roots, and {name} was not afraid any more.
Side by side they walked, while the first stars came out.

At last {name} saw a light in a window. It was {his} house!
Soon they could see smoke from the chimney, and {name} cried, "That is my house!"
Then {he} heard {his} {adult} calling, "{name}! {name}!"
And there, at the end of the path, stood {his} {adult} with a lantern.

"Thank you," {he} said to the {animal}, and it bowed its head and ran off.
Before {he} went in, {he} turned to thank the {animal}, and it winked at {him}.
{name} thanked the {animal} and promised to visit it soon.
Every week after that, {name} left something good to eat for the {animal}.
""",
        place=("forest", "woods", "hills"),
        animal=("squirrel", "fox", "hare", "badger", "mouse", "hedgehog", "otter"),
    ),
    _plot(
        ("{a_food}", "{a_food} to share", "two friends and {a_food}"),
        """
{name} had {a_food}, and it was the last one.
{day}, {name}'s {adult} gave {him} {a_food}.
{day}, {name} bought {a_food} with {his} own money.
A {child} named {name} had {a_food} for lunch.

It smelled so good that {his} mouth began to water.
It was big and fresh, and {he} could not wait to eat it.
{He} had been thinking about it all morning.
There was nothing in the world that {he} liked better.

{He} sat down {where} and was about to take a bite.
So {he} found a good place {where} and sat down to eat.
Happily, {he} carried it to a quiet place {where}.
With a big smile, {he} sat down {where}.

Then {friend} came by and sat down too.
Just then {friend} came along and stopped to rest.
Before {he} could begin, {friend} came and sat beside {him}.
At that moment {friend} walked up with slow steps.

{friend} had no lunch and looked very hungry.
"I dropped my lunch in the mud," said {friend} sadly.
"I left my lunch at home," said {friend}.
{friend} did not ask for anything, but a hungry tummy rumbled.

{name} looked at the {food}, and then {he} looked at {friend}.
At first {name} wanted to keep the {food} and not share it.
For a moment {name} held the {food} a little tighter.
"If I share, I will have only half," thought {name}.

"But two friends should share," {he} thought.
But {he} did not want to eat while a friend was hungry, and the two friends could share.
Then {he} remembered what {his} {adult} always said: "Friends share, and two can be as happy as one."
But then {he} thought how sad it is to be hungry. "We are two friends," {he} said, "so we will share."

So {he} broke it in two and gave {friend} the bigger half.
Carefully, {he} cut it down the middle and said, "One half is for you."
"Here," said {name}, "half of it is yours."
With a smile, {he} handed half of it to {friend}.

"Thank you!" said {friend}, and they ate it together.
{friend} took a bite and said, "This is the best {food} I have ever had!"
They ate every crumb and talked and laughed.
How good it tasted when they ate it together!

The next day, {friend} brought two {colour} apples, one for each of them.
"It tasted better with you here," said {name}, and it was true.
On the way home, {name} felt warm and happy inside.
After that, they always ate their lunch side by side.
""",
        food=("jam bun", "apple pie", "cheese sandwich", "plum cake", "egg sandwich", "honey roll"),
        where=("under a tree", "by the pond", "on a bench in the park", "on the school steps"),
        colour=("red", "green", "yellow"),
    ),
    _plot(
        ("a swim in the {water}", "a {child} who learned to swim"),
        """
{name} was a {child} who lived near a {water} but could not swim.
All the children could swim in the {water}, but {name} could not.
Once there was a {child} named {name} who wanted to swim in the {water}.
Every summer {name} sat beside the {water} and watched the others swim.

The water looked deep and dark to {him}.
It looked like fun, but {he} was afraid of the deep water.
Whenever {his} feet got wet, {he} ran back to the grass.
"What if I sink?" {he} always said.

{day}, {his} {adult} said, "Would you like me to teach you?"
{day}, {his} {adult} took {him} by the hand and said, "Today we will try."
{day}, {he} went to {his} {adult} and said, "Please teach me."
{day}, {his} {adult} bought {him} {a_colour} swimsuit and promised to help.

First they only walked in up to the knees.
At the edge, where it was not deep, they splashed with their feet.
They started close to the shore, hand in hand.
To begin with, they stood in the cool water and watched the little fish.

"Lie back, and I will hold you," said {his} {adult}.
{His} {adult} held {him} and said, "Kick your legs like a frog."
"Breathe slowly," said {his} {adult}, "and let the water carry you."
{His} {adult} showed {him} how to float like a leaf.

{name} tried, but water went up {his} nose.
At the first try, {name} went under and came up coughing.
Splash! {name} kicked too hard and got water in {his} eyes.
It did not go well, and {name} swallowed some water.

"I cannot do it," {he} said, but {he} came back the next day.
"I want to go home," {he} said. But the next morning {he} was ready to try again.
That evening {he} was sad, but in the morning {he} went back.
It would have been easy to give up, but {he} tried again the next day.

Each day {he} was a little braver.
Day by day {his} arms and legs grew stronger.
Every day {he} could stay up a little longer.
They went there every day for a week, and it grew easier each time.

Then, one day, {his} {adult} let go, and {name} kept on going.
And then it happened: {name} was moving through the water all alone!
One sunny day, {name} noticed that nobody was holding {him}.
At the end of the week, {name} went all the way from one rock to the next.

"Look at me!" {he} shouted. "I have learned to swim!"
"I have learned to swim!" {he} cried, and everyone clapped.
"You have learned to swim," said {his} {adult}, "because you did not give up."
{name} had learned to swim at last, and {he} did not want to come out until supper.
""",
        water=("lake", "pond", "river"),
    ),
    _plot(
        ("{a_thing}", "two friends who built {a_thing}"),
        """
{name} and {friend} were two friends who wanted to build {a_thing}.
"Let us build {a_thing}," said {name} to {friend}, for the two friends loved to make things.
{day}, {name} and {friend} had an idea. The two friends would build {a_thing}!
{name}, who was a clever {child}, told {friend} about a plan. The two friends would build {a_thing}.

They drew a picture of it on a big sheet of paper.
First they made a drawing and talked about it for a long time.
On a piece of paper, {name} drew how it should look.
All morning they talked about how it should look.

Then they asked {his} {adult} for some wood, a hammer, and a box of nails.
{His} {adult} gave them old boards and a box of nails.
Behind the shed they found boards, and {his} {adult} lent them a hammer.
They gathered boards and nails, and {his} {adult} showed them how to use a hammer.

Tap, tap, tap went the hammer all day long.
{friend} held the boards, and {name} hit the nails.
They measured and hammered and measured again.
It was hard work, and they sang while they hammered.

But when they stepped back to look, it leaned to one side.
Just when they thought that they were done, it fell apart with a crash.
In the evening a board came loose, and half of it fell down.
But one side was longer than the other, and it would not stay together.

"Oh dear," said {name}. "What did we do wrong?"
{name} wanted to kick it, but {he} sat down and looked at it.
"All that work!" said {friend}.
"It was a good try," said {friend}, "but it is not strong."

They looked at the drawing again and saw that some boards were missing.
"I see it now," said {name}. "It needs more boards in the corners."
Then {name} noticed that the corners were too weak.
After some thinking, {friend} said, "Let us make the corners stronger."

So they took their time and built it once more.
The next day they began again, and this time they did not hurry.
With a few more boards and nails, they built it again.
Slowly and carefully, they built it a second time.

This time it stood straight and strong.
When they shook it, it did not even wobble.
In the end, everything fitted just right.
At last it was as strong as it could be.

They painted it {colour}, and everybody came to see the {thing}.
With {colour} paint they wrote both their names on the {thing}.
"We made this {thing} with our own hands," said {name}, and they were both very proud.
{His} {adult} looked at the {thing} and said, "Well done, you two."
""",
        thing=("playhouse", "dog house", "tree house", "bird house", "little table", "toy castle", "rabbit hutch"),
    ),
    _plot(
        ("a noise in the night", "a strange noise and {a_animal}"),
        """
One night {name} woke up because of a strange noise.
{name} was a {child} who slept well, until one night a strange noise woke {him}.
In the middle of the night, {name} heard a strange noise.
A strange noise woke {name} from a deep sleep one night.

{sound}, it went, and then it was quiet again.
{sound}! It came from somewhere in the house.
"{sound}," it went, over and over again.
It went {sound_low}, and then it stopped, and then it began again.

{name} pulled the {colour} blanket up to {his} chin.
Under {his} {colour} blanket, {name} did not dare to move.
The room was dark, and {name} held {his} breath.
{His} heart beat fast, and {he} hugged {his} pillow.

"Is it a monster?" {he} wondered.
"Maybe it is a ghost," {he} thought.
"What can it be?" {he} whispered into the dark.
"Who is there?" {he} called softly, but nobody answered.

{He} wanted to hide, but {he} wanted to know even more.
Then {he} told {himself} to be brave and got out of bed.
After a while, {he} sat up and put {his} feet on the floor.
Not knowing was worse than anything, so {he} got up.

With a small lamp in {his} hand, {he} tiptoed down the stairs.
Step by step, {he} crept down the stairs with a small lamp.
So {he} took a small lamp and went along the hall and down the stairs.
The stairs were cold under {his} feet, and {his} small lamp made long shadows.

The noise was coming from the kitchen door.
Now {he} could tell that the noise came from the kitchen door.
Down there, the noise was louder. It came from behind the kitchen door.
In the kitchen, the noise was very close. Something was behind the door!

Slowly {he} opened the door, and there sat {a_animal}, all wet and cold.
{name} counted to three and opened the door. It was only {a_animal} that wanted to come in!
With one quick pull, {he} opened the door and found {a_animal}, shivering in the dark.
When {he} opened the door, {a_animal} looked up at {him} with round eyes.

"So it was you!" said {name}, and {he} began to laugh.
"You are not a monster at all," said {name}, laughing.
{name} laughed with relief and let it in.
"Come in, little one," said {name}. "You were scared too."

{He} gave it some milk, and it fell asleep on the rug.
Soon the {animal} was warm and dry, and the house was quiet for the rest of the night.
Then {name} dried it with a towel, made it a bed in a box, and slept soundly until morning.
In the morning {his} {adult} found the two of them asleep on the kitchen floor.
""",
        animal=("kitten", "puppy", "grey cat", "little dog", "orange cat"),
        sound=("Scratch, scratch", "Tap, tap, tap", "Thump, thump", "Bump, bump, bump"),
    ),
    _plot(
        ("the sea", "a {thing} from the sea", "a {child} who lived by the sea"),
        """
{name} was a {child} who lived by the sea.
In {a_colour} house by the sea there lived a {child} named {name}.
Once there was a {child} named {name} who lived in a village by the sea.
By the sea, in a small {colour} house, lived a {child} called {name}.

Every day {he} walked along the sand and listened to the waves.
Each morning {he} ran down to the beach to see what the waves had brought.
{He} loved the salty wind and the song of the waves.
There was nothing {he} liked more than looking for treasure on the beach.

{day}, {he} found a {thing} lying in the sand.
{day}, something shone in the sand. It was a {thing}.
{day}, a wave rolled in and left a {thing} at {his} feet.
{day}, {he} saw a {thing} between two rocks.

"How lovely!" said {name}, and {he} picked it up.
Carefully, {he} picked it up and brushed off the sand.
{name} had never seen anything so lovely.
With a cry of joy, {he} held it up to the light.

But then {he} heard a little sigh. A small {animal} was looking at {him}.
Just then {he} heard someone sniff. Beside a rock sat a small {animal}.
"Oh," said a tiny voice. It was a small {animal}.
All of a sudden, {he} saw a small {animal} with a very sad face.

"That {thing} is mine," said the {animal}. "The big waves took it away."
"I have been looking for my {thing} for three days," said the {animal}.
The {animal} said, "That {thing} was a gift from my mother."
"My {thing}!" said the {animal}. "I thought that I would never see it again."

{name} wanted to keep it, for it was so pretty.
It was hard for {name} to let it go.
{name} looked at the pretty thing in {his} hand and said nothing for a while.
"I would have loved to take it home," thought {name}.

But {he} could see how much it meant to the {animal}.
But it belonged to someone else, and {he} knew it.
Then {he} thought, "It is not mine to keep."
Then {he} looked at the sad little face and knew what to do.

"Here you are," {he} said, and {he} gave the {thing} back.
So {he} knelt down and gave the {thing} back with a smile.
Gently, {he} laid the {thing} down in front of the {animal}.
"I am glad that I found you," {he} said, and {he} held out the {thing}.

The {animal} danced with joy and showed {him} a secret pool full of little fish.
"You are kind," said the {animal}. "Come back tomorrow, and we will play."
The {animal} was so happy that it came to the beach every day to play with {him}.
When {name} went home that evening, {he} had no treasure, but {he} had a new friend.
""",
        thing=("silver shell", "pink shell", "shiny pearl", "golden ring", "blue stone"),
        animal=("crab", "turtle", "seal", "sea otter"),
    ),
    _plot(
        ("a {animal} in a tree", "a {animal} that could not get down"),
        """
{name} had a {animal} that loved to climb.
{name} was a {child} who had a very curious {animal}.
Once there was a {child} named {name} who had a little {animal}.
A {child} named {name} lived with a {animal} that was always getting into trouble.

{day}, the {animal} climbed up a tall tree and could not get down.
{day}, the {animal} ran up a tree after {a_colour} butterfly, and then it could not get down.
{day}, a dog barked, and the {animal} shot up a tree. Now it could not get down.
{day}, the {animal} went up into the highest tree in the {place}, and it could not get down.

"Meow," it cried from a high branch.
It sat on a thin branch and cried.
High above the ground, it held on with all its claws.
"Meow, meow!" it called, and its voice was very small.

"Do not move!" called {name}. "I will help you."
{name} looked up and did not know how to reach it.
{name} stretched out {his} arms, but the branch was far too high.
"Oh, you poor thing," said {name}, looking up.

First {he} held up a fish, but the {animal} was too scared to move.
First {he} called and called, but it would not come.
To begin with, {he} tried to climb the tree, but {he} slid back down.
At first {he} jumped as high as {he} could, but that was no help at all.

Then {friend} came by and said, "Let us think before we try again."
Just then {friend} came along and asked, "Can I help?"
{friend} heard the noise and came running.
Before long {friend} was standing there too, looking up at the branch.

"We need something long," said {name}.
"If only we had something long," said {name}.
They looked around the {place} for something that could help.
They thought and thought, and {name} walked around the tree twice.

"I know!" said {friend}. "There is a long board behind the fence."
Then {friend} saw a long board leaning on the fence.
In the end it was {name} who found a long board beside the fence.
"Look over there!" said {friend}. Next to the fence lay a long board.

They leaned it against the tree to make a kind of bridge.
Together they lifted it up and leaned it on the branch.
With all their strength, they set one end of it on the branch.
It was heavy, but the two of them could lift it up to the branch.

Paw by paw, the {animal} walked down into {name}'s arms.
The {animal} sniffed at it, took one step, then another, and soon it was safe on the ground.
Slowly, the {animal} came down, and {name} held it close.
Down came the {animal}, step by step, and {name} gave it a kiss on the nose.

"Next time, stay on the ground," said {name}, and they all went home.
"Thank you, {friend}," said {name}. "I could not have done it alone."
That night the {animal} slept on {name}'s bed and purred like a little engine.
The {animal} purred as if nothing had happened, and {name} and {friend} had to laugh.
""",
        animal=("kitten", "cat", "black cat", "grey kitten", "striped kitten"),
        place=("garden", "park", "yard", "village"),
    ),
    _plot(
        ("a snowman", "a snowman and a {colour} scarf"),
        """
When {name} woke up, the whole world was white with snow.
It had snowed all night, and in the morning {name} could not believe {his} eyes.
One winter morning, {name} looked out and saw snow on every roof.
{name} was a {child} who loved the snow, and one winter morning it was everywhere.

"I will make a snowman," {he} said, and {he} put on {his} warm boots.
"Can we make a snowman?" {he} asked {his} {adult}, and {he} was outside in no time.
Right after breakfast, {he} went out to make a snowman.
{He} put on {his} coat and boots and ran out to make a snowman.

{friend} came to help, and they rolled three big balls.
Together with {friend}, {he} rolled a big ball, a middle ball, and a small ball.
Next door lived {friend}, who came over to help {him} roll the snow into balls.
Soon {friend} was there too, and they pushed and rolled the snow.

They used stones for the eyes and a carrot for the nose.
A carrot became the nose, and two stones became the eyes.
For the eyes they took two dark stones, and for the nose they took a carrot.
With two stones, a carrot, and a row of buttons, they made a friendly face.

But something was not right, for the snowman looked cold.
"It looks cold," said {friend}. "Something is missing."
But when they were done, {name} was not happy. "It looks so cold," {he} said.
They stepped back to look. "The poor snowman must be cold," said {name}.

{name} took off {his} own {colour} scarf and put it around the neck of the snowman.
"It can have mine," said {name}, and {he} tied {his} {colour} scarf around its neck.
So {name} gave it {his} very own {colour} scarf.
Without a word, {name} wrapped {his} {colour} scarf around its neck.

"Now you will be cold," said {friend}.
"But what will you wear?" asked {friend}.
{friend} looked at {him} in surprise.
"That was your best one," said {friend}.

"I can go inside and get warm," said {name}, "but a snowman has to stay out here."
{name} only laughed and said, "I have a warm house, and it does not."
"I have a coat and a fire at home," said {name}.
{name} shook {his} head and said, "I do not need it as much."

Then they went in, and {his} {adult} gave them hot milk.
After that they went inside to sit by the fire with a cup of hot milk.
When their toes were frozen, they went in to the fire, where {his} {adult} had made soup.
In the evening they sat at the window and drank hot milk.

That night, when the moon was bright, it looked as if the snowman smiled.
From the window {name} waved, and {he} was almost sure that the snowman waved back.
When {name} looked out once more, the snowman seemed to smile at {him}.
"Good night, snowman," said {name}, and softly it began to snow again.
""",
        colour=("red", "blue", "green", "yellow", "purple", "long", "striped"),
    ),
    _plot(
        ("{a_thing} that would not play", "{a_thing} and a {child} who did not give up"),
        """
{name} was a {child} who found {a_thing} in the attic.
For {his} birthday, {name} got {a_thing} from {his} {adult}.
{day}, {name}'s {adult} gave {him} {a_thing}.
Once there was a {child} named {name} who had {a_thing} but did not know how to use it.

"I will play the finest song in the world," {he} said.
{He} wanted to play a song on it right away.
In {his} mind, {he} could already hear a lovely song.
{He} could not wait to play a song for everyone.

But when {he} tried, it would not play. It only squeaked.
{He} tried it once, but it would not play at all. It just made a funny sound.
But it would not play a song. Out came a noise like a sleepy goose.
So {he} tried, and tried again, but it would not play the way {he} wanted.

The dog howled, and the cat ran out of the room.
Even the birds in the garden stopped singing.
{His} friend {friend}, who was listening, put both hands over both ears.
Outside the window, a cow looked up in surprise.

"This {thing} is no good," said {name}, and {he} put it away.
"It must be broken," said {name}, and {he} put the {thing} under {his} bed.
{name} threw {himself} on the bed and said, "I will never play again."
"I give up," said {name}, and {he} pushed the {thing} into a corner.

"Nobody can do it on the first day," said {his} {adult}.
{His} {adult} sat down beside {him} and said, "Every song starts with one note."
"Start with something small," said {his} {adult}. "Learn one note today."
But {his} {adult} only smiled and said, "When I was small, it took me a whole year to learn one song."

So {he} learned one note, and the next day {he} learned another.
That evening {he} played one note until it was clear and sweet.
So {he} practised one note in the morning and one note at night.
The next day {he} tried again, very slowly, one note at a time.

Days went by, and the notes became a tune.
Week after week, the sound grew softer and sweeter.
By the time the leaves were {leaf}, {he} could play a little tune.
Little by little, the notes joined hands and turned into a song.

Then one evening {he} played a whole song for {his} family.
At last the day came when {he} played a whole song without a mistake.
And one Sunday {he} stood up and played a whole song for all the neighbours.
Then, at the village party, {he} played a whole song.

This time everyone listened, and then they all began to dance.
Everyone clapped, and {his} {adult} wiped away a happy tear.
"Bravo!" they all shouted, and {name} took a bow.
When it was over, {name} smiled and said, "It started with one note."
""",
        thing=("old flute", "small trumpet", "little violin", "wooden flute", "old horn", "silver trumpet"),
        leaf=("red", "yellow", "golden"),
    ),
    _plot(
        ("a {bird} with a hurt wing", "a {child} who helped a {bird}"),
        """
{day}, {name} found a {bird} under a tree. It had a hurt wing.
{day}, a {child} named {name} saw a {bird} sitting on the ground with a hurt wing.
{day}, on the way home from a walk, {name} came upon a {bird} with a hurt wing.
{day}, {name} heard a soft cry in the {place}. It was a {bird} with a hurt wing.

It tried to fly, but it could not.
Again and again it hopped up, and again and again it fell back.
It looked up with frightened eyes.
Its little heart was beating very fast.

"You poor thing," said {name}. "I will help you."
"I will not hurt you," whispered {name}.
{name} knelt down and spoke to it in a gentle voice.
{name} was a kind {child}, and {he} could not leave it there.

Gently, {he} put it into {his} {colour} hat and carried it home.
With great care, {he} wrapped it in {his} {colour} scarf and took it home.
So {he} lifted it up with both hands and carried it home.
Very slowly, so as not to scare it, {he} picked it up and brought it home.

"Can we keep it?" {he} asked. "Only until it can fly," said {his} {adult}.
{His} {adult} looked at the wing and said, "It needs rest."
"Will it ever fly again?" {he} asked. "I think so," said {his} {adult}.
"We must be very gentle," said {his} {adult}.

They made a nest out of a box and some soft grass.
{name} filled a box with straw and put it in a warm place.
A shoe box with a soft cloth became its bed.
By the window they set a box lined with wool.

Every day {he} helped it eat seeds and drink a little water.
Each morning {name} helped it with food and water and sang to it.
For many days {name} helped it, fed it, and kept it warm.
Morning and evening, {he} brought seeds and water and helped it eat.

After two weeks, the {bird} began to flap its wings.
Soon the {bird} was hopping all over the table.
One morning the {bird} sang for the first time.
Before long the {bird} flew from the box to the chair.

"It is time to let it go," said {his} {adult}.
{name} knew that it was time to say goodbye.
It made {name} sad, but {he} knew that birds belong in the sky.
"I will miss you," said {name}, "but you want to be free."

So {he} carried it outside and opened {his} hands, and up it flew.
Out in the {place}, {he} opened {his} hands, and it flew into the blue sky.
So {he} opened the window wide, and it flew out into the sun.
Under the old tree {he} let it go, and it flew once around {his} head.

The next spring, a {bird} sat on the window sill and sang for {name}.
Every spring after that, it came back and built its nest near the house.
It left one small feather behind, and {name} kept it always.
Sometimes, early in the morning, {name} still hears it singing.
""",
        bird=("sparrow", "robin", "blackbird", "little bird", "swallow"),
        place=("garden", "orchard", "park"),
    ),
)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title_case(text: str) -> str:
    first, *rest = text.split()
    return " ".join([_capitalized(first), *(word if word in _SMALL_WORDS else _capitalized(word) for word in rest)])


def _the(subject: str) -> str:
    return re.sub(r"^an? ", "the ", subject)


def _fill_slots(rng: random.Random, plot: _Plot) -> dict[str, str]:
    """A value for each slot, also as {a_slot} with its article, {slot_low} in lower case, {Slot} capitalized."""
    girl = rng.random() < 0.5
    name = rng.choice(_GIRLS if girl else _BOYS)
    friend = rng.choice([other for other in _GIRLS + _BOYS if other != name])
    drawn = {slot: rng.choice(values) for slot, values in {**_COMMON_SLOTS, **plot.slots}.items()}
    values = {"name": name, "friend": friend, **(_SHE if girl else _HE), **drawn}
    values |= {f"a_{slot}": _with_article(value) for slot, value in drawn.items()}
    values |= {f"{slot}_low": value.lower() for slot, value in drawn.items()}
    return values | {_capitalized(slot): _capitalized(value) for slot, value in values.items()}


def _tell(rng: random.Random, plot: _Plot, values: Mapping[str, str]) -> str:
    """One sentence from each position, where possible not starting with the same word as the one before."""
    told: list[str] = []
    last_opening = ""
    for position in plot.positions:
        sentences = [sentence.format_map(values) for sentence in position]
        fresh = [sentence for sentence in sentences if _openings(sentence)[0] != last_opening]
        told.append(rng.choice(fresh or sentences))
        last_opening = _openings(told[-1])[-1]
    return " ".join(told)


def _openings(text: str) -> list[str]:
    """The first word of each sentence in a piece of text."""
    return [re.sub(r"\W", "", sentence.split()[0]) for sentence in re.split(r'(?<=[.!?])"? ', text)]


def write_story(rng: random.Random) -> Story:
    """A story of MIN_WORDS to MAX_WORDS words that fulfills its request."""
    plot = rng.choice(_PLOTS)
    values = _fill_slots(rng, plot)
    main_subject = plot.subjects[0].format_map(values)
    title = _title_case(rng.choice((_the(main_subject), f"{values['name']} and {_the(main_subject)}")))
    template = rng.choice(_REQUESTS)
    subject = main_subject if template in _ABOUT_BOTH else rng.choice(plot.subjects).format_map(values)
    request = template.format_map({**values, "subject": subject, "the_subject": _the(subject)})
    return Story(request, title, _tell(rng, plot, values))


if __name__ == "__main__":
    _rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for _story in (write_story(_rng) for _ in range(3)):
        print(f"> {_story.request}\n\n{_story.title}\n\n{_story.text}\n")
