/* What ring.c gives to others. */
#ifndef RING_H
#define RING_H

struct ring {
	unsigned int first, count, size;
	int *values;
};

int ring_push(struct ring *ring, int value);
int ring_pop(struct ring *ring);

#endif
