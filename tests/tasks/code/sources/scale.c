/* Two scales, and what is between them. */

static int scale_clamp(int value, int low, int high)
{
	if (value < low)
		return low;
	if (value > high)
		return high;
	return value;
}

int scale_blend(int from, int to, int share)
{
	int kept = scale_clamp(share, 0, 100);

	return (from * (100 - kept) + to * kept) / 100;
}

int scale_spread(const int *values, int count)
{
	int low = values[0], high = values[0];

	for (int i = 1; i < count; i++) {
		low = values[i] < low ? values[i] : low;
		high = values[i] > high ? values[i] : high;
	}
	return high - low;
}

int scale_middle(const int *values, int count)
{
	long sum = 0;

	for (int i = 0; i < count; i++)
		sum += values[i];
	return count ? sum / count : 0;
}
