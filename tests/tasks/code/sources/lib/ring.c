// A ring of numbers, written for tests of the index.
#include <stdlib.h>
#include "ring.h"

/**
 * ring_push() - Put a number behind those that wait in a ring
 * @ring: the ring, which must not be full
 * @value: the number
 *
 * ring_push() wakes nobody; a reader has to look by itself.
 *
 * Return: how many numbers wait now.
 */
int ring_push(struct ring *ring, int value)
{
	unsigned int place = (ring->first + ring->count) % ring->size;

	ring->values[place] = value;
	ring->count += 1;
	return ring->count;
}

/* Not kernel-doc: it has a single star. */
static int __init ring_setup(struct ring *ring,
			     unsigned int size)
{
	ring->values = malloc(size * sizeof(*ring->values));
	if (!ring->values)
		return -1;
	ring->size = size;
	ring->first = ring->count = 0;
	return 0;
}

static inline struct ring *
ring_new(unsigned int size)
{
	struct ring *ring = malloc(sizeof(*ring));

	if (ring && ring_setup(ring, size) < 0) {
		free(ring);
		ring = NULL;
	}
	return ring;
}

/**
 * something_else - This comment names another function
 */
int ring_pop(struct ring *ring)
{
	int value = ring->values[ring->first];

	for_each_slot(ring, slot) {
		ring_check(slot);
	}
	ring->first = (ring->first + 1) % ring->size;
	ring->count -= 1;
	return value;
}

RING_DEFINE2(resize, struct ring *, ring, unsigned int, size)
{
	return ring_push(ring, size);
}
int ring_touch(struct ring *ring) { return ring_push(ring, 0) + ring_pop(ring); }

int ring_greet(void)
{
	return ring_print("Größe: %d Zahlen – genug?", 3);
}
