/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/* The serial port, a small printf, the memory functions that gcc calls, and how a test ends.  */
#include "guest.h"

#define COM1 0x3f8

const char *test_name = "boot";
u32 failures;
static char first_failure[160];
static char *sink;		/* print into memory instead */
static size_t sink_left;

void serial_init(void)
{
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 0x80);
	outb(COM1, 1);
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 3);
	outb(COM1 + 2, 1);
	outb(COM1 + 4, 3);
}

int serial_rx(void)
{
	return (inb(COM1 + 5) & 1) ? inb(COM1) : -1;
}

static void put(char c)
{
	if (sink) {
		if (sink_left > 1) {
			*sink++ = c;
			sink_left--;
		}
		return;
	}
	while (!(inb(COM1 + 5) & 0x20))
		relax();
	outb(COM1, c);
}

static void put_num(u64 v, u32 base)
{
	char buf[24];
	u32 n = 0;

	do {
		buf[n++] = "0123456789abcdef"[v % base];
		v /= base;
	} while (v);
	while (n)
		put(buf[--n]);
}

void vprint(const char *fmt, va_list ap)
{
	for (; *fmt; fmt++) {
		bool l = false;

		if (*fmt != '%') {
			put(*fmt);
			continue;
		}
		if (*++fmt == 'l') {
			l = true;
			fmt++;
		}
		switch (*fmt) {
		case 's':
			for (const char *s = va_arg(ap, const char *); *s; s++)
				put(*s);
			break;
		case 'c':
			put(va_arg(ap, int));
			break;
		case 'd': {
			int64_t v = l ? va_arg(ap, int64_t) : va_arg(ap, int);

			if (v < 0)
				put('-');
			put_num(v < 0 ? -(u64)v : (u64)v, 10);
			break;
		}
		case 'u':
			put_num(l ? va_arg(ap, u64) : va_arg(ap, u32), 10);
			break;
		case 'x':
			put_num(l ? va_arg(ap, u64) : va_arg(ap, u32), 16);
			break;
		default:
			put(*fmt);
		}
	}
}

void print(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vprint(fmt, ap);
	va_end(ap);
}

void diag(const char *fmt, ...)
{
	va_list ap;

	print("# ");
	va_start(ap, fmt);
	vprint(fmt, ap);
	va_end(ap);
	print("\n");
}

static void remember(const char *fmt, va_list ap)
{
	sink = first_failure;
	sink_left = sizeof(first_failure);
	vprint(fmt, ap);
	*sink = 0;
	sink = NULL;
}

bool check(bool ok, const char *fmt, ...)
{
	va_list ap;

	if (ok)
		return true;
	if (failures++ == 0) {
		va_start(ap, fmt);
		remember(fmt, ap);
		va_end(ap);
	}
	if (failures <= 20) {
		print("# not ok: ");
		va_start(ap, fmt);
		vprint(fmt, ap);
		va_end(ap);
		print("\n");
	}
	return false;
}

void pass_or_fail(const char *name)
{
	if (!failures) {
		print("PASS %s\n", name);
		shut(0x10);
	}
	print("FAIL %s: %s", name, first_failure);
	if (failures > 1)
		print(" (and %u more)", failures - 1);
	print("\n");
	shut(0x11);
}

void fail(const char *fmt, ...)
{
	va_list ap;

	print("FAIL %s: ", test_name);
	va_start(ap, fmt);
	vprint(fmt, ap);
	va_end(ap);
	print("\n");
	shut(0x11);
}

void skip(const char *fmt, ...)
{
	va_list ap;

	if (failures)
		pass_or_fail(test_name);
	print("SKIP %s: ", test_name);
	va_start(ap, fmt);
	vprint(fmt, ap);
	va_end(ap);
	print("\n");
	shut(0x12);
}

void *memcpy(void *d, const void *s, size_t n)
{
	u8 *a = d;
	const u8 *b = s;

	for (; n >= 8; n -= 8, a += 8, b += 8)
		*(u64 *)a = *(const u64 *)b;
	while (n--)
		*a++ = *b++;
	return d;
}

void *memset(void *d, int c, size_t n)
{
	u8 *a = d;
	u64 v = 0x0101010101010101ull * (u8)c;

	for (; n >= 8; n -= 8, a += 8)
		*(u64 *)a = v;
	while (n--)
		*a++ = c;
	return d;
}

int memcmp(const void *a, const void *b, size_t n)
{
	const u8 *x = a, *y = b;

	for (; n; n--, x++, y++)
		if (*x != *y)
			return *x < *y ? -1 : 1;
	return 0;
}

bool streq(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}
